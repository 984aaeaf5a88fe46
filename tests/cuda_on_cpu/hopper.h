// What stands for Hopper's instructions (csrc/cuda/ptx_sm90.cuh) on a CPU: barriers in shared
// memory, copies by TMA, products of a warpgroup.
//
// Copies land when a thread waits for their barrier, products are taken when their warp waits for
// them, the latest moments that a GPU may choose. In between, to read what a copy is about to
// write, or to start one over what a product is about to read, is an error.
#pragma once

#include <deque>

#include "intrinsics.h"

#define __grid_constant__
#define COMPRESSOPS_TMA_SHARED(T, name, bytes) COMPRESSOPS_DYNAMIC_SHARED(T, name, bytes)

namespace cuda_on_cpu {

struct BoxCopy {
  SharedRegion* region;
  std::size_t offset;
  std::vector<unsigned char> bytes;
};

struct Barrier {
  int arrivals, missing;  // of a phase; still to come in this one
  int64_t bytes = 0;      // still to come
  unsigned phase = 0;
  int maker;
  uint32_t made;  // the maker's epoch
  std::vector<BoxCopy> copies;
  std::vector<int> waiting;
};

// Bytes that a product reads, [begin, end) of a region.
struct OperandRows {
  SharedRegion* region;
  std::size_t begin;
  int rows, column;
};
struct Product {
  std::function<void()> run;
  std::vector<OperandRows> reads;
};
// The block's barriers, by their place, and the products of each thread: groups that were
// committed, and at the end the one that is being filled.
inline std::map<std::pair<SharedRegion*, int64_t>, Barrier> barriers;
inline std::map<int, std::deque<std::vector<Product>>> products;

inline void reset_hopper() {
  barriers.clear();
  products.clear();
}

inline Barrier& barrier_at(compressops::Shared<uint64_t> place) {
  const auto found = barriers.find({place.region(), place.checked(0)});
  if (found == barriers.end()) fail("an mbarrier at byte ", place.offset(), " that nobody made");
  Barrier& barrier = found->second;
  if (barrier.maker != block.current && barrier.made == current_thread().block_epoch) {
    fail("an mbarrier that thread ", barrier.maker, " made, with no __syncthreads between");
  }
  return barrier;
}

inline void end_phase_if_complete(Barrier& barrier) {
  if (barrier.missing < 0) fail("an mbarrier of ", barrier.arrivals, " arrivals gets one more");
  if (barrier.missing > 0 || barrier.bytes != 0) return;
  ++barrier.phase;
  barrier.missing = barrier.arrivals;
  for (int thread : barrier.waiting) block.threads[thread].state = Thread::State::kReady;
  barrier.waiting.clear();
}

inline void land_copies(Barrier& barrier) {
  for (const BoxCopy& copy : barrier.copies) {
    std::memcpy(copy.region->bytes + copy.offset, copy.bytes.data(), copy.bytes.size());
    for (std::size_t i = 0; i < copy.bytes.size(); ++i) {
      copy.region->shadow[copy.offset + i].copy_pending = false;
    }
    barrier.bytes -= static_cast<int64_t>(copy.bytes.size());
  }
  const bool any = !barrier.copies.empty();
  barrier.copies.clear();
  if (any) end_phase_if_complete(barrier);
}

}  // namespace cuda_on_cpu

namespace compressops {

constexpr bool kHasWgmma = true, kBuiltForSm90a = true;

inline void mbarrier_init(Shared<uint64_t> place, int arrivals) {
  cuda_on_cpu::barriers[{place.region(), place.checked(0)}] = {
      arrivals,
      arrivals,
      0,
      0,
      cuda_on_cpu::block.current,
      cuda_on_cpu::current_thread().block_epoch,
      {},
      {}};
}

inline void mbarrier_fence_init() {}

inline void mbarrier_arrive_expect(Shared<uint64_t> place, int bytes) {
  cuda_on_cpu::Barrier& barrier = cuda_on_cpu::barrier_at(place);
  barrier.bytes += bytes;
  --barrier.missing;
  cuda_on_cpu::end_phase_if_complete(barrier);
}

inline void mbarrier_arrive(Shared<uint64_t> place) { mbarrier_arrive_expect(place, 0); }

inline void mbarrier_wait(Shared<uint64_t> place, unsigned parity) {
  cuda_on_cpu::Barrier& barrier = cuda_on_cpu::barrier_at(place);
  for (;;) {
    if (barrier.phase % 2 != parity) break;
    cuda_on_cpu::land_copies(barrier);
    if (barrier.phase % 2 != parity) break;
    barrier.waiting.push_back(cuda_on_cpu::block.current);
    cuda_on_cpu::current_thread().state = cuda_on_cpu::Thread::State::kInWarp;
    cuda_on_cpu::current_thread().operation = "mbarrier_wait";
    cuda_on_cpu::suspend();
  }
}

struct TensorMap {
  const unsigned char *first, *low, *high;
  int64_t rows, columns, row_stride;  // in bytes, but for the rows
  int box_rows, box_columns;
  bool swizzled;
  const char* name;
};

template <class T>
cudaError_t make_tensor_map(Global<const T> matrix, int64_t rows, int64_t columns,
                            int64_t row_stride, int box_rows, int box_columns, bool swizzled,
                            TensorMap* map) {
  constexpr int64_t kSize = sizeof(T);
  *map = {matrix.at(),     matrix.low(),       matrix.high(), rows,
          columns * kSize, row_stride * kSize, box_rows,      box_columns * static_cast<int>(kSize),
          swizzled,        matrix.name()};
  const bool fits = rows > 0 && columns > 0 && misalignment(matrix, 16) == 0 &&
                    map->row_stride % 16 == 0 && box_rows <= 256 && box_columns <= 256 &&
                    map->box_columns % 16 == 0 && (!swizzled || map->box_columns == 128);
  return fits ? cudaSuccess : cudaErrorInvalidValue;
}

template <class T>
void tma_load(Shared<T> target, const TensorMap& map, int64_t row, int64_t column,
              Shared<uint64_t> place) {
  using namespace cuda_on_cpu;
  BoxCopy copy{target.region(), static_cast<std::size_t>(target.checked(0)), {}};
  copy.bytes.resize(static_cast<std::size_t>(map.box_rows) * map.box_columns);
  target.checked(static_cast<int64_t>(copy.bytes.size() / sizeof(T)) - 1);
  if (copy.offset % (map.swizzled ? 1024 : 128) != 0) fail("TMA to byte ", copy.offset);
  for (int r = 0; r < map.box_rows; ++r) {
    for (int c = 0; c < map.box_columns; ++c) {
      const int64_t m = row + r, k = column * static_cast<int64_t>(sizeof(T)) + c;
      unsigned char value = 0;
      if (m >= 0 && m < map.rows && k >= 0 && k < map.columns) {
        const unsigned char* at = map.first + m * map.row_stride + k;
        if (at < map.low || at >= map.high) fail("TMA leaves global array \"", map.name, "\"");
        value = *at;
      }
      copy.bytes[r * map.box_columns + (map.swizzled ? c ^ r % 8 * 16 : c)] = value;
    }
  }
  for (const auto& [thread, groups] : products) {
    for (const auto& group : groups) {
      for (const Product& product : group) {
        for (const OperandRows& read : product.reads) {
          if (read.region == copy.region && read.begin < copy.offset + copy.bytes.size() &&
              copy.offset < read.begin + 128 * static_cast<std::size_t>(read.rows)) {
            fail("TMA over what a wgmma of thread ", thread, " is reading, byte ", copy.offset,
                 " of shared array \"", copy.region->name, "\"");
          }
        }
      }
    }
  }
  for (std::size_t i = 0; i < copy.bytes.size(); ++i) {
    Shadow& shadow = copy.region->shadow[copy.offset + i];
    if (shadow.copy_pending) fail("two copies to byte ", copy.offset + i);
    shadow.copy_pending = true;
    shadow.writer = kTma;
  }
  Barrier& barrier = barrier_at(place);
  barrier.copies.push_back(std::move(copy));
  if (!barrier.waiting.empty()) land_copies(barrier);
}

// Rows of 128 bytes from a group of eight on, and a column of bytes.
struct WgmmaOperand {
  cuda_on_cpu::SharedRegion* region;
  std::size_t begin, end;  // where the rows begin, and what the array holds
  int column;

  // The 16-byte chunk `chunk` from the column on.
  const unsigned char* at(int row, int chunk) const {
    const std::size_t offset = begin + row * 128 + ((column / 16 + chunk) ^ row % 8) * 16;
    if (offset + 16 > end) {
      cuda_on_cpu::fail("wgmma: byte ", offset, " of shared array \"", region->name,
                        "\" is out of bounds");
    }
    const cuda_on_cpu::Shadow& shadow = region->shadow[offset];
    if (shadow.copy_pending) cuda_on_cpu::fail("wgmma reads before the TMA copy is waited for");
    if (shadow.writer == cuda_on_cpu::kNobody)
      cuda_on_cpu::fail("wgmma reads byte ", offset, ", never written");
    return region->bytes + offset;
  }
};

template <class T>
WgmmaOperand wgmma_operand(Shared<T> rows, int column_bytes) {
  const auto begin = static_cast<std::size_t>(rows.checked(0));
  if (begin % 1024 != 0 || column_bytes % 32 != 0 || column_bytes >= 128) {
    cuda_on_cpu::fail("wgmma of rows at byte ", begin, ", column ", column_bytes);
  }
  return {rows.region(), begin, static_cast<std::size_t>(rows.high()), column_bytes};
}

inline void wgmma_begin() { cuda_on_cpu::exchange(~0u, char{0}, "wgmma_begin"); }

inline void wgmma_commit() {
  auto& groups = cuda_on_cpu::products[cuda_on_cpu::block.current];
  if (groups.empty()) groups.emplace_back();
  groups.emplace_back();
}

template <int kPending>
void wgmma_wait() {
  auto& groups = cuda_on_cpu::products[cuda_on_cpu::block.current];
  while (static_cast<int>(groups.size()) - 1 > kPending) {
    for (const auto& product : groups.front()) product.run();
    groups.pop_front();
  }
  cuda_on_cpu::exchange(~0u, char{0}, "wgmma_wait");
}

template <int kRegisters>
void lower_registers() {}
template <int kRegisters>
void raise_registers() {}

inline void start_product(cuda_on_cpu::Product product) {
  auto& groups = cuda_on_cpu::products[cuda_on_cpu::block.current];
  if (groups.empty()) groups.emplace_back();
  groups.back().push_back(std::move(product));
}

template <int kSums>
void wgmma_s8(int (&c)[kSums], const WgmmaOperand& a, const WgmmaOperand& b) {
  const int lane = cuda_on_cpu::lane(), warp = cuda_on_cpu::block.current / cuda_on_cpu::kWarp;
  int* const sums = c;
  const auto run = [=] {
    for (int half = 0; half < 2; ++half) {
      const int row = 16 * (warp % 4) + 8 * half + lane / 4;
      for (int chunk = 0; chunk < 2; ++chunk) {
        const auto* left = reinterpret_cast<const int8_t*>(a.at(row, chunk));
        for (int i = 0; i < kSums / 2; ++i) {
          const int column = 8 * (i / 2) + 2 * (lane % 4) + i % 2;
          const auto* right = reinterpret_cast<const int8_t*>(b.at(column, chunk));
          int& sum = sums[4 * (i / 2) + 2 * half + i % 2];
          for (int k = 0; k < 16; ++k) sum += left[k] * right[k];
        }
      }
    }
  };
  start_product(
      {run, {{a.region, a.begin, 64, a.column}, {b.region, b.begin, 2 * kSums, b.column}}});
}

template <class T>
float bits_to_float(uint32_t bits) {
  const T value{static_cast<uint16_t>(bits)};
  if constexpr (std::is_same_v<T, __half>) {
    return __half2float(value);
  } else {
    return __bfloat162float(value);
  }
}

// What the four lanes of a row brought of the left operand.
struct QuadFragments {
  uint32_t words[4][4];
};

template <class T>
void wgmma_f32(float (&c)[64], const uint32_t (&a)[4], const WgmmaOperand& b, bool add) {
  struct Fragment {
    uint32_t words[4];
  };
  const int lane = cuda_on_cpu::lane();
  const auto all = cuda_on_cpu::exchange(~0u, Fragment{{a[0], a[1], a[2], a[3]}}, "wgmma");
  QuadFragments quad;
  for (int i = 0; i < 16; ++i) quad.words[i / 4][i % 4] = all[lane / 4 * 4 + i / 4].words[i % 4];
  float* const sums = c;
  const uint32_t* const mine = a;
  const auto run = [=] {
    for (int i = 0; i < 4; ++i) {
      if (mine[i] != quad.words[lane % 4][i]) {
        cuda_on_cpu::fail("registers of a wgmma are written before it is waited for");
      }
    }
    for (int half = 0; half < 2; ++half) {
      for (int i = 0; i < 32; ++i) {
        const int column = 8 * (i / 2) + 2 * (lane % 4) + i % 2;
        float& sum = sums[4 * (i / 2) + 2 * half + i % 2];
        if (!add) sum = 0.0f;
        for (int chunk = 0; chunk < 2; ++chunk) {
          const auto* right = reinterpret_cast<const uint16_t*>(b.at(column, chunk));
          for (int k = 0; k < 8; ++k) {
            const uint32_t left = quad.words[k / 2][2 * chunk + half] >> 16 * (k % 2) & 0xffff;
            sum += bits_to_float<T>(left) * bits_to_float<T>(right[k]);
          }
        }
      }
    }
  };
  start_product({run, {{b.region, b.begin, 128, b.column}}});
}

}  // namespace compressops
