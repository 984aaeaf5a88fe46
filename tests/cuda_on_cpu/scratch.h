// Memory that a launch asks for besides its arguments.
#pragma once

#include <cstdint>
#include <memory>

#include "cuda_on_cpu.h"

namespace cuda_on_cpu {

// Vectors, so that the scratch is as aligned as torch's.
template <class T>
struct Scratch {
  Scratch(int64_t count_, const char* name_)
      : count(count_), name(name_), data(new int4[count * sizeof(T) / 16 + 1]) {}
  compressops::Global<T> array() const {
    return compressops::Global<T>(reinterpret_cast<T*>(data.get()), count, name);
  }
  int64_t count;
  const char* name;
  std::unique_ptr<int4[]> data;
};

}  // namespace cuda_on_cpu
