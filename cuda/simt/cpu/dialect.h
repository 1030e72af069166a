// g++'s side of simt.cuh: CUDA's qualifiers, built-in variables, intrinsics and the launch as plain C++17.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <tuple>
#include <type_traits>
#include <utility>

#include "model.h"
#include "vectors.h"
#include "half.h"

#define __global__
#define __device__
#define __host__
// An OS thread runs one block at a time, or one cluster (then: refused). __constinit: no guard variable for float4's sake.
#define __shared__ static __constinit thread_local
#define __constant__ static
#define __forceinline__ inline  // as g++ sees fit: forced, the kernels of a step would not share their large functions
#define __launch_bounds__(...)
#define __grid_constant__
#define __cluster_dims__(...)
#define __restrict__
#define __align__(bytes) __attribute__((aligned(bytes)))

#define threadIdx (::simt::model::current->thread_index)
#define blockIdx (::simt::model::current->block_index)
#define blockDim (::simt::model::current->block_size)
#define gridDim (::simt::model::current->grid_size)
constexpr int warpSize = 32;

namespace simt {

struct Launch {
  dim3 grid, block;
  size_t shared_bytes = 0;
  unsigned cluster = 1;
  bool co_resident = false;
  void* stream = nullptr;
  bool overlap = false;  // nothing to overlap with: the model runs one grid after the other
};

template <class T>
T& dynamic_shared(SIMT_SITE_ONLY) {
  return *reinterpret_cast<T*>(model::shared_memory(sizeof(T), site));
}

// Runs the grid to its end. Raises simt::Error with the model's report.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), const Launch& shape, Arguments&&... arguments) {
  struct Call {
    void (*kernel)(Parameters...);
    std::tuple<std::decay_t<Parameters>...> arguments;
  } call{kernel, {std::forward<Arguments>(arguments)...}};
  model::run_grid(
      shape.grid, shape.block, shape.shared_bytes, shape.cluster, shape.co_resident,
      [](void* pointer) {
        auto* call = static_cast<Call*>(pointer);
        std::apply(call->kernel, call->arguments);
      },
      &call, reinterpret_cast<const void*>(kernel));
}

inline int multiprocessors() { return options().multiprocessors; }

}  // namespace simt

using CUtensorMap = simt::TensorMap;

// ---- synchronisation -----------------------------------------------------------------------------------------------
inline void __syncthreads(SIMT_SITE_ONLY) { simt::model::barrier_sync(0, 0, site); }
inline void __syncwarp(unsigned mask = ~0u SIMT_SITE) {
  simt::model::warp_collective(mask, simt::model::WarpOp::syncwarp, nullptr, nullptr, site);
}
inline void __threadfence(SIMT_SITE_ONLY) { simt::model::fence_memory(site); }
inline void __threadfence_block(SIMT_SITE_ONLY) { simt::model::fence_memory(site); }
inline void __nanosleep(unsigned SIMT_SITE) { simt::model::poll(site); }
inline long long clock64() { return (long long)simt::model::clock(); }
inline void __trap(SIMT_SITE_ONLY) { simt::model::trap(site); }

// ---- warp shuffles and votes -----------------------------------------------------------------------------------------
namespace simt::model {

inline int lane() { return int(current->linear % 32); }

struct Shuffle {
  uint64_t in, out;
  int source;
};
SIMT_MODEL_CODE inline void shuffle_lanes(void** payloads, unsigned mask) {
  for (int lane = 0; lane < 32; ++lane) {
    if (!(mask >> lane & 1)) continue;
    auto* mine = static_cast<Shuffle*>(payloads[lane]);
    const bool there = mask >> mine->source & 1;
    mine->out = there ? static_cast<Shuffle*>(payloads[mine->source])->in : ~0ull;  // undefined on the hardware: poison
  }
}
template <class T>
T shuffle(unsigned mask, T value, int source, Site site) {
  static_assert(sizeof(T) <= 8, "shuffles move at most 8 bytes");
  Shuffle message{0, 0, source};
  std::memcpy(&message.in, &value, sizeof(T));
  warp_collective(mask, WarpOp::shuffle, &message, shuffle_lanes, site);
  std::memcpy(&value, &message.out, sizeof(T));
  return value;
}

struct Vote {
  bool in;
  unsigned out;
};
SIMT_MODEL_CODE inline void count_votes(void** payloads, unsigned mask) {
  unsigned votes = 0;
  for (int lane = 0; lane < 32; ++lane)
    if (mask >> lane & 1) votes |= unsigned(static_cast<Vote*>(payloads[lane])->in) << lane;
  for (int lane = 0; lane < 32; ++lane)
    if (mask >> lane & 1) static_cast<Vote*>(payloads[lane])->out = votes;
}

}  // namespace simt::model

// A source outside the segment of `width` lanes leaves the value as it is.
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32 SIMT_SITE) {
  const int lane = simt::model::lane();
  return simt::model::shuffle(mask, value, (lane & ~(width - 1)) + (source & (width - 1)), site);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32 SIMT_SITE) {
  const int lane = simt::model::lane(), source = lane ^ bits;
  return simt::model::shuffle(mask, value, source / width > lane / width ? lane : source, site);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32 SIMT_SITE) {
  const int lane = simt::model::lane(), source = lane + int(delta);
  return simt::model::shuffle(mask, value, source / width != lane / width ? lane : source, site);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32 SIMT_SITE) {
  const int lane = simt::model::lane(), source = lane - int(delta);
  return simt::model::shuffle(mask, value, source < (lane & ~(width - 1)) ? lane : source, site);
}
inline unsigned __ballot_sync(unsigned mask, bool predicate SIMT_SITE) {
  simt::model::Vote vote{predicate, 0};
  simt::model::warp_collective(mask, simt::model::WarpOp::vote, &vote, simt::model::count_votes, site);
  return vote.out;
}
inline bool __any_sync(unsigned mask, bool predicate SIMT_SITE) { return __ballot_sync(mask, predicate, site) != 0; }
inline bool __all_sync(unsigned mask, bool predicate SIMT_SITE) { return !__ballot_sync(mask, !predicate, site); }
inline unsigned __activemask() {  // all lanes that exist
  const dim3 size = blockDim;
  const unsigned lanes = size.x * size.y * size.z - simt::model::current->linear / 32 * 32;
  return lanes < 32 ? (1u << lanes) - 1 : ~0u;
}

// ---- memory ------------------------------------------------------------------------------------------------------------
template <class T>
T __ldg(const T* pointer) { return *pointer; }
template <class T>
T __ldcs(const T* pointer) { return *pointer; }
template <class T>
void __stcs(T* pointer, T value) { *pointer = value; }
template <class T>
void __stwt(T* pointer, T value) { *pointer = value; }

namespace simt::model {
// One read-modify-write that returns the old value; of 4 and 8 bytes. Instantiated in model/memory.cpp.
template <class T>
T atomic_update(T* pointer, T (*change)(T old, T operand, T compare), T operand, T compare, Site);
}  // namespace simt::model

#define SIMT_ATOMIC(NAME, EXPRESSION)                                                                             \
  template <class T>                                                                                              \
  T NAME(T* pointer, T value SIMT_SITE) {                                                                         \
    return simt::model::atomic_update<T>(                                                                         \
        pointer, [](T old, T operand, T) -> T { return EXPRESSION; }, value, value, site);                        \
  }
SIMT_ATOMIC(atomicAdd, old + operand)
SIMT_ATOMIC(atomicSub, old - operand)
SIMT_ATOMIC(atomicMax, old < operand ? operand : old)
SIMT_ATOMIC(atomicMin, operand < old ? operand : old)
SIMT_ATOMIC(atomicExch, ((void)old, operand))
#undef SIMT_ATOMIC
template <class T>
T atomicCAS(T* pointer, T compare, T value SIMT_SITE) {
  return simt::model::atomic_update<T>(
      pointer, [](T old, T operand, T compare) -> T { return old == compare ? operand : old; }, value, compare, site);
}

// ---- arithmetic: the fast-math names, in full precision -----------------------------------------------------------------
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __frcp_rn(float x) { return 1.f / x; }
inline float rsqrtf(float x) { return 1.f / std::sqrt(x); }
inline float __fmaf_rn(float x, float y, float z) { return std::fma(x, y, z); }
inline unsigned __float_as_uint(float x) { return simt::bits_of_float(x); }
inline float __uint_as_float(unsigned x) { return simt::float_of_bits(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
inline int __ffs(int x) { return __builtin_ffs(x); }
using std::max;
using std::min;
