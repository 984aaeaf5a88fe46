// Global<T> and Shared<T>: pointers that check every access.
//
// Both check bounds and alignment. Shared memory also remembers, byte by byte, who wrote and who
// read it last and how many barriers that thread had passed. An access that conflicts with another
// thread's (one of the two a write) is an error unless a __syncthreads, or a __syncwarp within a
// warp, stands between them, in whatever order the threads happened to run. So is a read of
// a byte that nobody wrote, or that an unfinished cp.async or TMA is about to write.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <map>
#include <memory>
#include <string>
#include <type_traits>
#include <vector>

#include "block.h"

namespace cuda_on_cpu {

// The last accesses to one byte. `read_by_*` widen: the thread `reader`, several lanes of its warp
// since their last __syncwarp, or several warps.
constexpr int16_t kNobody = -1, kTma = -2;
struct Shadow {
  int16_t writer = kNobody, reader = kNobody;
  bool write_atomic = false, read_by_lanes = false, read_by_warps = false, copy_pending = false;
  uint32_t write_block = 0, write_warp = 0, read_block = 0, read_warp = 0;
};

struct SharedRegion {
  std::string name;
  const void* key;
  std::vector<unsigned char> storage;
  unsigned char* bytes;
  std::vector<Shadow> shadow;

  SharedRegion(std::string name_, const void* key_, std::size_t size)
      : name(std::move(name_)), key(key_), storage(size + 16, 0xa5), shadow(size) {
    bytes = storage.data() + (16 - reinterpret_cast<std::uintptr_t>(storage.data()) % 16) % 16;
  }

  [[noreturn]] void race(std::size_t byte, const char* does, int other, const char* did) const {
    fail("race on shared array \"", name, "\", byte ", byte, ": ", does, " what thread ", other,
         " ", did, " with no barrier between");
  }

  void record_read(std::size_t begin, std::size_t size) {
    const Thread& me = current_thread();
    const int id = block.current;
    for (std::size_t byte = begin; byte < begin + size; ++byte) {
      Shadow& s = shadow[byte];
      if (s.copy_pending) {
        fail("reads shared array \"", name, "\", byte ", byte,
             ", before its cp.async is waited for");
      }
      if (s.writer == kNobody) {
        fail("reads shared array \"", name, "\", byte ", byte, ", never written");
      }
      if (s.writer != id && concurrent(s.writer, s.write_block, s.write_warp)) {
        race(byte, "reads", s.writer, "wrote");
      }
      const bool fresh = s.reader < 0 || s.read_block != me.block_epoch;
      if (!fresh && s.reader / kWarp != id / kWarp) {
        s.read_by_warps = true;
      } else if (fresh || s.read_warp != me.warp_epoch) {
        s.reader = static_cast<int16_t>(id);
        s.read_block = me.block_epoch;
        s.read_warp = me.warp_epoch;
        s.read_by_lanes = false;
        if (fresh) s.read_by_warps = false;
      } else if (s.reader != id) {
        s.read_by_lanes = true;
      }
    }
  }

  void record_write(std::size_t begin, std::size_t size, bool atomic = false) {
    const Thread& me = current_thread();
    const int id = block.current;
    for (std::size_t byte = begin; byte < begin + size; ++byte) {
      Shadow& s = shadow[byte];
      if (s.copy_pending) {
        fail("writes shared array \"", name, "\", byte ", byte, ", that a cp.async is writing");
      }
      if (s.writer >= 0 && s.writer != id && !(atomic && s.write_atomic) &&
          concurrent(s.writer, s.write_block, s.write_warp)) {
        race(byte, "writes", s.writer, "wrote");
      }
      if (s.reader >= 0 && s.read_block == me.block_epoch) {
        const bool same_warp = s.reader / kWarp == id / kWarp;
        if (s.read_by_warps || !same_warp ||
            (s.read_warp == me.warp_epoch && (s.read_by_lanes || s.reader != id))) {
          race(byte, "writes", s.reader, "read");
        }
      }
      s.writer = static_cast<int16_t>(id);
      s.write_block = me.block_epoch;
      s.write_warp = me.warp_epoch;
      s.write_atomic = atomic;
    }
  }

 private:
  static bool concurrent(int other, uint32_t block_epoch, uint32_t warp_epoch) {
    const Thread& me = current_thread();
    if (other < 0 || block_epoch != me.block_epoch) return false;
    return other / kWarp != block.current / kWarp || warp_epoch == me.warp_epoch;
  }
};

// The block's array for a declaration; the first thread that comes by makes it.
inline SharedRegion* shared_region(const void* key, const char* name, std::size_t size) {
  for (const auto& region : block.shared) {
    if (region->key == key) return region.get();
  }
  block.shared.push_back(std::make_unique<SharedRegion>(name, key, size));
  return block.shared.back().get();
}

struct PendingCopy {
  SharedRegion* region;
  std::size_t offset;
  unsigned char bytes[16];
};
// Copies of each thread: groups that were committed, and at the end the one that is being filled.
inline std::map<int, std::vector<std::vector<PendingCopy>>> pending_copies;

void reset_hopper();  // hopper.h

inline void reset_shared() {
  block.shared.clear();
  pending_copies.clear();
  reset_hopper();
}

}  // namespace cuda_on_cpu

namespace compressops {

template <class T>
class Shared {
 public:
  using Region = cuda_on_cpu::SharedRegion;
  Shared() = default;
  Shared(Region* region, int64_t offset, int64_t low, int64_t high)
      : region_(region), offset_(offset), low_(low), high_(high) {}

  class Reference {
   public:
    Reference(Region* region, int64_t offset) : region_(region), offset_(offset) {}
    Reference(const Reference&) = default;
    operator T() const {
      region_->record_read(offset_, sizeof(T));
      T value;
      std::memcpy(&value, region_->bytes + offset_, sizeof(T));
      return value;
    }
    Reference& operator=(const T& value) {
      region_->record_write(offset_, sizeof(T));
      std::memcpy(region_->bytes + offset_, &value, sizeof(T));
      return *this;
    }
    Reference& operator=(const Reference& other) { return *this = static_cast<T>(other); }
    Reference& operator+=(const T& value) { return *this = static_cast<T>(T(*this) + value); }
    Reference& operator-=(const T& value) { return *this = static_cast<T>(T(*this) - value); }
    Reference& operator|=(const T& value) { return *this = static_cast<T>(T(*this) | value); }

   private:
    Region* region_;
    int64_t offset_;
  };

  Reference operator[](int64_t index) const { return Reference(region_, checked(index)); }
  Reference operator*() const { return (*this)[0]; }
  Shared operator+(int64_t count) const {
    return Shared(region_, offset_ + count * static_cast<int64_t>(sizeof(T)), low_, high_);
  }

  // Byte offset of an element, after checks.
  int64_t checked(int64_t index) const {
    if (region_ == nullptr) cuda_on_cpu::fail("accesses a shared array that was never declared");
    const int64_t at = offset_ + index * static_cast<int64_t>(sizeof(T));
    if (at < low_ || at + static_cast<int64_t>(sizeof(T)) > high_) {
      cuda_on_cpu::fail("shared array \"", region_->name, "\": bytes ", at, " to ",
                        at + static_cast<int64_t>(sizeof(T)), " are out of bounds [", low_, ", ",
                        high_, ")");
    }
    if (at % static_cast<int64_t>(alignof(T)) != 0) {
      cuda_on_cpu::fail("shared array \"", region_->name, "\": byte ", at,
                        " is misaligned for an access of ", sizeof(T), " bytes");
    }
    return at;
  }

  Region* region() const { return region_; }
  int64_t offset() const { return offset_; }
  int64_t low() const { return low_; }
  int64_t high() const { return high_; }

 private:
  Region* region_ = nullptr;
  int64_t offset_ = 0, low_ = 0, high_ = 0;
};

template <class T>
class Global {
  using Byte = std::conditional_t<std::is_const_v<T>, const unsigned char, unsigned char>;

 public:
  Global(std::nullptr_t = nullptr) {}
  Global(T* data, int64_t count, const char* name)
      : Global(reinterpret_cast<Byte*>(data), reinterpret_cast<Byte*>(data),
               reinterpret_cast<Byte*>(data + count), name) {}
  Global(Byte* at, Byte* low, Byte* high, const char* name)
      : at_(at), low_(low), high_(high), name_(name) {}
  operator Global<const T>() const
    requires(!std::is_const_v<T>)
  {
    return Global<const T>(at_, low_, high_, name_);
  }

  T& operator[](int64_t index) const {
    Byte* at = at_ + index * static_cast<int64_t>(sizeof(T));
    if (at_ == nullptr || at < low_ || at + sizeof(T) > high_) {
      cuda_on_cpu::fail("global array \"", name_, "\": bytes ", at - low_, " to ",
                        at - low_ + static_cast<int64_t>(sizeof(T)), " are out of bounds [0, ",
                        high_ - low_, ")");
    }
    if (reinterpret_cast<std::uintptr_t>(at) % alignof(T) != 0) {
      cuda_on_cpu::fail("global array \"", name_, "\": byte ", at - low_,
                        " is misaligned for an access of ", sizeof(T), " bytes");
    }
    return *reinterpret_cast<T*>(at);
  }
  T& operator*() const { return (*this)[0]; }
  Global operator+(int64_t count) const {
    return Global(at_ + count * static_cast<int64_t>(sizeof(T)), low_, high_, name_);
  }
  bool operator==(std::nullptr_t) const { return at_ == nullptr; }

  Byte* at() const { return at_; }
  Byte* low() const { return low_; }
  Byte* high() const { return high_; }
  const char* name() const { return name_; }

 private:
  Byte *at_ = nullptr, *low_ = nullptr, *high_ = nullptr;
  const char* name_ = "null";
};

// Only the bounds shrink, so that one part of an array cannot be reached through another.
template <class T>
Shared<T> slice(Shared<T> array, int64_t offset, int64_t count) {
  const Shared<T> start = array + offset;
  const int64_t end = start.offset() + count * static_cast<int64_t>(sizeof(T));
  if (start.offset() < array.low() || end > array.high() || count < 0) {
    cuda_on_cpu::fail("slice [", offset, ", ", offset + count, ") leaves shared array \"",
                      array.region()->name, "\"");
  }
  return Shared<T>(array.region(), start.offset(), start.offset(), end);
}

template <class T>
Global<T> slice(Global<T> array, int64_t offset, int64_t count) {
  const Global<T> start = array + offset, end = start + count;
  if (start.at() < array.low() || end.at() > array.high() || count < 0) {
    cuda_on_cpu::fail("slice [", offset, ", ", offset + count, ") leaves global array \"",
                      array.name(), "\"");
  }
  return Global<T>(start.at(), start.at(), end.at(), array.name());
}

template <class To, class From>
Shared<To> view_as(Shared<From> array) {
  return Shared<To>(array.region(), array.offset(), array.low(), array.high());
}

template <class To, class From>
Global<To> view_as(Global<From> array) {
  return Global<To>(array.at(), array.low(), array.high(), array.name());
}

template <class T>
int misalignment(Global<T> array, int bytes) {
  return static_cast<int>(reinterpret_cast<std::uintptr_t>(array.at()) %
                          static_cast<std::uintptr_t>(bytes));
}

#define COMPRESSOPS_SHARED_ARRAY(T, name, count)                                   \
  static const char name##_key = 0;                                                \
  const ::compressops::Shared<T> name(                                             \
      ::cuda_on_cpu::shared_region(&name##_key, #name, (count) * sizeof(T)), 0, 0, \
      static_cast<int64_t>((count) * sizeof(T)))

#define COMPRESSOPS_DYNAMIC_SHARED(T, name, size)                                            \
  if (static_cast<std::size_t>(size) > ::cuda_on_cpu::block.dynamic_shared_bytes) {          \
    ::cuda_on_cpu::fail("wants ", size, " bytes of dynamic shared memory, the launch gave ", \
                        ::cuda_on_cpu::block.dynamic_shared_bytes);                          \
  }                                                                                          \
  const ::compressops::Shared<T> name(                                                       \
      ::cuda_on_cpu::shared_region(&::cuda_on_cpu::block, #name,                             \
                                   ::cuda_on_cpu::block.dynamic_shared_bytes),               \
      0, 0, static_cast<int64_t>(size))

}  // namespace compressops

namespace cuda_on_cpu {

// cp.async: the bytes are read now and land when the thread waits for them. In between the target
// belongs to the copy.
template <class T>
void start_copy(compressops::Shared<T> target, compressops::Global<const T> source, bool valid) {
  static_assert(sizeof(T) == 16);
  PendingCopy copy{target.region(), static_cast<std::size_t>(target.checked(0)), {}};
  if (valid) std::memcpy(copy.bytes, &source[0], 16);
  copy.region->record_write(copy.offset, 16);
  for (int i = 0; i < 16; ++i) copy.region->shadow[copy.offset + i].copy_pending = true;
  auto& groups = pending_copies[block.current];
  if (groups.empty()) groups.emplace_back();
  groups.back().push_back(copy);
}

inline void commit_copies() {
  auto& groups = pending_copies[block.current];
  if (groups.empty()) groups.emplace_back();
  groups.emplace_back();
}

// Lands all but the newest `pending` committed groups.
inline void wait_copies(int pending) {
  auto& groups = pending_copies[block.current];
  while (static_cast<int>(groups.size()) - 1 > pending) {
    for (const PendingCopy& copy : groups.front()) {
      for (int i = 0; i < 16; ++i) copy.region->shadow[copy.offset + i].copy_pending = false;
      copy.region->record_write(copy.offset, 16);
      std::memcpy(copy.region->bytes + copy.offset, copy.bytes, 16);
    }
    groups.erase(groups.begin());
  }
}

}  // namespace cuda_on_cpu
