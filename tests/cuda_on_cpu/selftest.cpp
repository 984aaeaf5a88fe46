// Small kernels with known results, or known mistakes, to test the checker itself.
#include <string>

#include "device.cuh"
#include "ptx.cuh"
#include "runner.h"

namespace {

using namespace compressops;
using Out = Global<int64_t>;

int lane_id() { return static_cast<int>(threadIdx.x) % 32; }

// 64 threads: every warp operation against what it must give.
void warp_operations(Out out) {
  const int lane = lane_id();
  bool good = __shfl_sync(kFullWarp, lane, 5) == 5;
  good &= __shfl_sync(kFullWarp, lane, 9, 8) == lane / 8 * 8 + 1;
  good &= __shfl_xor_sync(kFullWarp, lane, 3) == (lane ^ 3);
  good &= __shfl_up_sync(kFullWarp, lane, 2) == (lane < 2 ? lane : lane - 2);
  good &= __shfl_down_sync(kFullWarp, lane, 2) == (lane > 29 ? lane : lane + 2);
  good &= __ballot_sync(kFullWarp, lane % 2) == 0xaaaaaaaau;
  good &= __any_sync(kFullWarp, lane == 7) && !__any_sync(kFullWarp, lane == 32);
  good &= __all_sync(kFullWarp, lane < 32) && !__all_sync(kFullWarp, lane < 31);
  if (lane < 16) {
    good &= __shfl_sync(0x0000ffffu, lane, 1) == 1;
  } else {
    good &= __ballot_sync(0xffff0000u, 1) == 0xffff0000u;
  }
  good &= (__activemask() >> lane & 1) == 1;
  out[threadIdx.x] = good;
}

void arithmetic(Out out) {
  out[0] = __dp4a(0x7f80ff01, 0x02030405, 100);  // 127·2 − 128·3 − 1·4 + 1·5 + 100
  out[1] = __byte_perm(0x33221100, 0x77665544, 0x7401);
  out[2] = __popc(0xf0f0u) * 100 + __ffs(8) * 10 + __clz(0x0000ffff);
  out[3] = __funnelshift_r(0x89abcdefu, 0x01234567u, 8);
  out[4] = __funnelshift_l(0x89abcdefu, 0x01234567u, 8);
  out[5] = __brev(1u) >> 31;
  out[6] = __float2int_rn(2.5f) * 100 + __float2int_rn(3.5f) * 10 + __float2int_rn(-0.5f);
}

void atomics(Out out) {
  COMPRESSOPS_SHARED_ARRAY(int, sum, 1);
  COMPRESSOPS_SHARED_ARRAY(unsigned long long, low, 1);
  if (threadIdx.x == 0) {
    sum[0] = 0;
    low[0] = ~0ull;
  }
  __syncthreads();
  const int id = static_cast<int>(threadIdx.x);
  atomicAdd(sum + 0, id);
  atomicMin(low + 0, 1000ull + threadIdx.x);
  atomicMax(out + 2, id);
  atomicOr(out + 3, int64_t{1} << id / 8);
  if (id == 9) atomicExch(out + 4, 5);
  if (id == 9) atomicCAS(out + 4, 5, 6);
  if (id == 9) atomicCAS(out + 4, 5, 7);
  if (id == 9) atomicSub(out + 4, 1);
  __syncthreads();
  if (id == 0) {
    out[0] = sum[0];
    out[1] = static_cast<int64_t>(low[0]);
  }
}

// Neighbours exchange through shared memory. `barriers`: 2 right, 1 races with the next round, 0
// races at once.
template <int kBarriers>
void exchange_in_block(Out out) {
  COMPRESSOPS_SHARED_ARRAY(int, values, 64);
  const int id = static_cast<int>(threadIdx.x);
  for (int round = 0; round < 2; ++round) {
    values[id] = id + round;
    if (kBarriers >= 1) __syncthreads();
    out[id] = values[(id + 33) % 64];
    if (kBarriers >= 2) __syncthreads();
  }
}

template <bool kSync>
void exchange_in_warp(Out out) {
  COMPRESSOPS_SHARED_ARRAY(int, values, 64);
  const int id = static_cast<int>(threadIdx.x);
  values[id] = id;
  if (kSync) __syncwarp();
  out[id] = values[id ^ 1];
}

void reads_what_another_warp_wrote_after_syncwarp(Out out) {
  COMPRESSOPS_SHARED_ARRAY(int, values, 64);
  const int id = static_cast<int>(threadIdx.x);
  values[id] = id;
  __syncwarp();
  out[id] = values[id ^ 32];
}

void writes_past_a_shared_array(Out) {
  COMPRESSOPS_SHARED_ARRAY(int, values, 64);
  values[threadIdx.x + 1] = 1;
}

void writes_past_a_slice(Out) {
  COMPRESSOPS_SHARED_ARRAY(int, values, 64);
  slice(values, 0, 32)[threadIdx.x] = 1;
}

void reads_unwritten_shared(Out out) {
  COMPRESSOPS_SHARED_ARRAY(int, values, 64);
  if (threadIdx.x > 0) values[threadIdx.x] = 1;
  __syncthreads();
  out[threadIdx.x] = values[threadIdx.x];
}

void misaligned_shared(Out) {
  COMPRESSOPS_SHARED_ARRAY(uint8_t, values, 64);
  view_as<uint32_t>(values + 2)[0] = 1;
}

void misaligned_global(Out out) { view_as<int4>(out + 1)[0] = make_int4(0, 0, 0, 0); }

void reads_past_global(Out out) { out[threadIdx.x] = out[threadIdx.x + 1]; }

void wants_more_dynamic_shared(Out) {
  COMPRESSOPS_DYNAMIC_SHARED(int, values, 68);
  values[0] = 1;
}

void divergent_barrier(Out) {
  if (threadIdx.x < 32) __syncthreads();
}

void two_barriers(Out) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

void barrier_against_shuffle(Out out) {
  if (lane_id() == 0) {
    __syncthreads();
  } else {
    out[0] = __shfl_sync(kFullWarp, 1, 0);
  }
}

void lanes_that_never_come(Out out) {
  if (lane_id() < 16) out[0] = __shfl_sync(kFullWarp, 1, 0);
  if (lane_id() >= 16) __syncwarp(0xffff0000u);
}

void lane_outside_mask(Out out) {
  if (lane_id() < 16) out[0] = __shfl_sync(0xffffu, 1, 20);
}

void mask_without_caller(Out out) { out[0] = __shfl_sync(0xffffu, 1, 0); }

void exited_lane_in_mask(Out out) {
  if (lane_id() == 3) return;
  __syncwarp(1u << lane_id());  // lets lane 3 go in every order
  out[0] = __ballot_sync(kFullWarp, 1);
}

template <int kPending>
void copies(Out out) {
  COMPRESSOPS_SHARED_ARRAY(int4, stage, 64);
  const int id = static_cast<int>(threadIdx.x);
  cp_async_16(stage + id, view_as<const int4>(Global<const int64_t>(out) + 0), true);
  cp_async_commit();
  cp_async_wait<kPending>();
  __syncthreads();
  const int4 value = stage[(id + 1) % 64];
  out[id] = value.x;
}

}  // namespace

CUDA_ON_CPU_EXPORT int run_selftest(const char* name, int64_t* out, int order, unsigned seed,
                                    char* message) {
  const std::pair<const char*, void (*)(Out)> kernels[] = {
      {"warp_operations", warp_operations},
      {"arithmetic", arithmetic},
      {"atomics", atomics},
      {"two barriers a round", exchange_in_block<2>},
      {"one barrier a round", exchange_in_block<1>},
      {"no barrier", exchange_in_block<0>},
      {"syncwarp", exchange_in_warp<true>},
      {"no syncwarp", exchange_in_warp<false>},
      {"syncwarp across warps", reads_what_another_warp_wrote_after_syncwarp},
      {"past a shared array", writes_past_a_shared_array},
      {"past a slice", writes_past_a_slice},
      {"unwritten shared", reads_unwritten_shared},
      {"misaligned shared", misaligned_shared},
      {"misaligned global", misaligned_global},
      {"past global", reads_past_global},
      {"too little dynamic shared", wants_more_dynamic_shared},
      {"divergent barrier", divergent_barrier},
      {"two barriers", two_barriers},
      {"barrier against shuffle", barrier_against_shuffle},
      {"lanes that never come", lanes_that_never_come},
      {"lane outside mask", lane_outside_mask},
      {"mask without caller", mask_without_caller},
      {"exited lane in mask", exited_lane_in_mask},
      {"copy waited for", copies<0>},
      {"copy not waited for", copies<1>},
  };
  return cuda_on_cpu::guarded(order, seed, message, [&] {
    for (const auto& [known, kernel] : kernels) {
      if (std::string(known) == name) {
        return launch(kernel, dim3(1), dim3(64), 64, nullptr, Out(out, 64, "out"));
      }
    }
    throw cuda_on_cpu::Error(std::string("no kernel ") + name);
  });
}

CUDA_ON_CPU_EXPORT void half_to_float(const __half* from, float* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = to_float(from[i]);
}
CUDA_ON_CPU_EXPORT void float_to_half(const float* from, __half* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = from_float<__half>(from[i]);
}
CUDA_ON_CPU_EXPORT void float_to_bfloat16(const float* from, __nv_bfloat16* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = from_float<__nv_bfloat16>(from[i]);
}
