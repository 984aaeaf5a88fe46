// One grid at a time, its blocks one after the other, a block's threads as fibers.
//
// Everything that could hide a bug on a GPU is an error here: a barrier that not all threads reach,
// or reach at different lines; lanes that disagree about a warp operation; a deadlock.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <source_location>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "fiber.h"

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

// The scheduler sets these on every switch.
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace cuda_on_cpu {

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

enum class Order : int { kForward = 0, kReverse = 1, kRandom = 2 };

struct Options {
  Order order = Order::kForward;
  unsigned seed = 0;
};
inline Options options;

constexpr int kWarp = 32;

// Lanes that meet in one warp operation, and what each brought.
struct Meeting {
  unsigned mask, arrived = 0;
  const char* operation;
  std::vector<unsigned char> values;
};

struct Thread {
  enum class State { kReady, kAtBarrier, kInWarp, kExited };
  std::unique_ptr<Fiber> fiber;
  dim3 index;
  State state;
  std::source_location barrier;
  const char* operation;
  uint32_t block_epoch, warp_epoch;  // barriers passed so far: orders shared-memory accesses
};

struct SharedRegion;

// What the block that runs consists of.
struct Block {
  std::vector<Thread> threads;
  std::vector<std::vector<std::shared_ptr<Meeting>>> meetings;  // open ones, per warp
  std::vector<std::unique_ptr<SharedRegion>> shared;
  std::size_t dynamic_shared_bytes = 0;
  int current = -1;
  std::string error;
  std::function<void()> kernel;
};
inline Block block;

inline Thread& current_thread() { return block.threads[block.current]; }
inline int lane() { return block.current % kWarp; }

inline std::string where() {
  std::ostringstream out;
  out << "block (" << blockIdx.x << ", " << blockIdx.y << ", " << blockIdx.z << "), thread "
      << block.current;
  return out.str();
}

// `where` is the thread that ran last.
template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream out;
  out << where() << ": ";
  (out << ... << parts);
  throw Error(out.str());
}

inline void suspend() { current_thread().fiber->suspend(); }

inline void run_thread() {
  try {
    block.kernel();
  } catch (const std::exception& error) {
    block.error = error.what();
  }
  current_thread().state = Thread::State::kExited;
  suspend();
}

inline std::string barrier_line(const Thread& thread) {
  return "line " + std::to_string(thread.barrier.line());
}

// All threads are blocked or gone: lets a barrier pass if they all wait at the same one.
inline void pass_barrier() {
  const Thread* waiting = nullptr;
  const Thread* other = nullptr;
  for (const Thread& thread : block.threads) {
    if (thread.state == Thread::State::kAtBarrier && waiting == nullptr) waiting = &thread;
  }
  if (waiting == nullptr) {
    std::string waits;
    for (std::size_t warp = 0; warp < block.meetings.size(); ++warp) {
      for (const auto& meeting : block.meetings[warp]) {
        std::ostringstream out;
        out << "; warp " << warp << ": lanes " << std::hex << meeting->arrived << " wait in "
            << meeting->operation << " for lanes " << (meeting->mask & ~meeting->arrived);
        waits += out.str();
      }
    }
    fail("deadlock", waits);
  }
  for (const Thread& thread : block.threads) {
    if (thread.state != Thread::State::kAtBarrier ||
        thread.barrier.line() != waiting->barrier.line()) {
      other = &thread;
      break;
    }
  }
  if (other != nullptr) {
    const auto first = waiting - block.threads.data(), second = other - block.threads.data();
    const std::string at = "divergent __syncthreads: thread " + std::to_string(first) +
                           " waits at " + barrier_line(*waiting) + " while thread " +
                           std::to_string(second);
    if (other->state == Thread::State::kExited) fail(at, " has exited");
    if (other->state == Thread::State::kInWarp) fail(at, " waits in ", other->operation);
    fail(at, " waits at ", barrier_line(*other));
  }
  for (Thread& thread : block.threads) {
    thread.state = Thread::State::kReady;
    ++thread.block_epoch;
  }
}

inline void permute(std::vector<int64_t>& order, std::mt19937& random) {
  std::iota(order.begin(), order.end(), 0);
  if (options.order == Order::kReverse) std::reverse(order.begin(), order.end());
  if (options.order == Order::kRandom) std::shuffle(order.begin(), order.end(), random);
}

void reset_shared();  // checked_memory.h

inline void run_block(std::mt19937& random) {
  const int count = static_cast<int>(blockDim.x * blockDim.y * blockDim.z);
  block.threads.resize(count);
  block.meetings.assign((count + kWarp - 1) / kWarp, {});
  reset_shared();
  for (int i = 0; i < count; ++i) {
    Thread& thread = block.threads[i];
    if (!thread.fiber) thread.fiber = std::make_unique<Fiber>();
    thread.fiber->prepare(&run_thread);
    thread.index = dim3(i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y);
    thread.state = Thread::State::kReady;
    thread.operation = "";
    thread.block_epoch = thread.warp_epoch = 0;
  }
  std::vector<int64_t> order(count);
  int exited = 0;
  while (exited < count) {
    bool progress = false;
    permute(order, random);
    for (int64_t i : order) {
      if (block.threads[i].state != Thread::State::kReady) continue;
      progress = true;
      block.current = static_cast<int>(i);
      threadIdx = block.threads[i].index;
      block.threads[i].fiber->resume();
      if (!block.error.empty()) throw Error(block.error);
      exited += block.threads[i].state == Thread::State::kExited;
    }
    if (!progress) pass_barrier();
  }
}

template <class... Params, class... Args>
void run_grid(void (*kernel)(Params...), dim3 grid, dim3 threads, std::size_t shared_bytes,
              Args... args) {
  const int64_t count = static_cast<int64_t>(threads.x) * threads.y * threads.z;
  const int64_t blocks = static_cast<int64_t>(grid.x) * grid.y * grid.z;
  if (count < 1 || count > 1024) throw Error("blocks of " + std::to_string(count) + " threads");
  if (blocks < 1 || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) {
    throw Error("a grid of " + std::to_string(grid.x) + " x " + std::to_string(grid.y) + " x " +
                std::to_string(grid.z) + " blocks");
  }
  if (shared_bytes > 227 * 1024) {
    throw Error(std::to_string(shared_bytes) + " bytes of shared memory");
  }
  block.error.clear();
  block.dynamic_shared_bytes = shared_bytes;
  block.kernel = [=] { kernel(static_cast<Params>(args)...); };
  blockDim = threads;
  gridDim = grid;
  std::mt19937 random(options.seed);
  std::vector<int64_t> order(blocks);
  permute(order, random);
  for (int64_t i : order) {
    blockIdx = dim3(static_cast<unsigned>(i % grid.x), static_cast<unsigned>(i / grid.x % grid.y),
                    static_cast<unsigned>(i / grid.x / grid.y));
    run_block(random);
  }
}

// What the lanes of `mask` brought to one warp operation, by lane.
template <class T>
class Exchanged {
 public:
  Exchanged(std::shared_ptr<Meeting> meeting) : meeting_(std::move(meeting)) {}
  const T& operator[](int lane_index) const {
    if (lane_index < 0 || lane_index >= kWarp || !(meeting_->mask >> lane_index & 1)) {
      fail(meeting_->operation, " reads lane ", lane_index, ", which is not in its mask");
    }
    return reinterpret_cast<const T*>(meeting_->values.data())[lane_index];
  }
  unsigned mask() const { return meeting_->mask; }

 private:
  std::shared_ptr<Meeting> meeting_;
};

// Waits until every lane of `mask` has come to the same operation with the same mask.
template <class T>
Exchanged<T> exchange(unsigned mask, const T& mine, const char* operation) {
  static_assert(std::is_trivially_copyable_v<T>);
  const int warp = block.current / kWarp, first = warp * kWarp;
  const int lanes = std::min<int>(kWarp, static_cast<int>(block.threads.size()) - first);
  if (lanes < kWarp) mask &= (1u << lanes) - 1;
  const unsigned me = 1u << lane();
  if (!(mask & me)) fail(operation, ": the mask ", mask, " lacks the calling lane");
  for (int i = 0; i < lanes; ++i) {
    if ((mask >> i & 1) && block.threads[first + i].state == Thread::State::kExited) {
      fail(operation, ": the mask names lane ", i, ", which has exited");
    }
  }
  auto& open = block.meetings[warp];
  std::shared_ptr<Meeting> meeting;
  for (const auto& candidate : open) {
    if (candidate->mask == mask && std::strcmp(candidate->operation, operation) == 0) {
      meeting = candidate;
    }
  }
  if (!meeting) {
    meeting = std::make_shared<Meeting>(Meeting{mask, 0, operation, {}});
    meeting->values.resize(kWarp * sizeof(T));
    open.push_back(meeting);
  }
  std::memcpy(meeting->values.data() + lane() * sizeof(T), &mine, sizeof(T));
  meeting->arrived |= me;
  if (meeting->arrived == mask) {
    std::erase(open, meeting);
    for (int i = 0; i < lanes; ++i) {
      if (mask >> i & 1) block.threads[first + i].state = Thread::State::kReady;
    }
  } else {
    current_thread().state = Thread::State::kInWarp;
    current_thread().operation = operation;
    suspend();
  }
  return Exchanged<T>(meeting);
}

}  // namespace cuda_on_cpu

inline void __syncthreads(std::source_location at = std::source_location::current()) {
  cuda_on_cpu::current_thread().state = cuda_on_cpu::Thread::State::kAtBarrier;
  cuda_on_cpu::current_thread().barrier = at;
  cuda_on_cpu::suspend();
}

// Orders the lanes' shared-memory accesses if the whole warp takes part. Fewer lanes only meet: the
// race checker is stricter than CUDA there.
inline void __syncwarp(unsigned mask = 0xffffffffu) {
  const bool whole = mask == 0xffffffffu;
  cuda_on_cpu::exchange(mask, char{0}, "__syncwarp");
  if (whole) ++cuda_on_cpu::current_thread().warp_epoch;
}
