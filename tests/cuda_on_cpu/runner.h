// What the runners of the ops share: how a Python test asks for a launch and hears what went wrong.
#pragma once

#include <cstddef>
#include <cstdio>
#include <exception>

#include "cuda_on_cpu.h"

#define CUDA_ON_CPU_EXPORT extern "C" __attribute__((visibility("default")))

namespace cuda_on_cpu {

constexpr std::size_t kMessageBytes = 1024;

// Runs `body` with the threads in an order; 0, or 1 with a message if a kernel did wrong.
template <class Body>
int guarded(int order, unsigned seed, char* message, Body&& body) {
  options = {static_cast<Order>(order), seed};
  try {
    const cudaError_t error = body();
    if (error == cudaSuccess) return 0;
    std::snprintf(message, kMessageBytes, "launch failed with error %d", static_cast<int>(error));
  } catch (const std::exception& error) {
    std::snprintf(message, kMessageBytes, "%s", error.what());
  }
  return 1;
}

}  // namespace cuda_on_cpu
