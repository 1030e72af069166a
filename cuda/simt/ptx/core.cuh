// How a wrapper chooses its side, and the instructions that fit nowhere else.
#pragma once
#include "../simt.cuh"

// PTX(instruction, model): nvcc compiles the first, g++ the second.
#if defined(__CUDACC__)
#define PTX(instruction, ...) instruction
#else
#define PTX(instruction, ...) __VA_ARGS__
#endif
#define PTX_INLINE __device__ __forceinline__

namespace ptx {

// Where the pointer's target lies in the shared window: what PTX operands and matrix descriptors take.
PTX_INLINE uint32_t shared_address(const void* pointer SIMT_SITE) {
  PTX(return uint32_t(__cvta_generic_to_shared(pointer)), return simt::model::shared_address(pointer, site));
}

// ---- clusters ----
PTX_INLINE uint32_t cluster_rank() {
  uint32_t rank;
  PTX(asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank)), rank = simt::model::current->cluster_rank);
  return rank;
}
PTX_INLINE uint32_t cluster_size() {
  uint32_t size;
  PTX(asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(size)), size = simt::model::current->cluster_size);
  return size;
}
// The same variable in the shared memory of another block of the cluster, to be read and written as usual.
template <class T>
PTX_INLINE T* map_shared_rank(T* pointer, uint32_t rank SIMT_SITE) {
  T* mapped;
  PTX(asm volatile("mapa.u64 %0, %1, %2;" : "=l"(mapped) : "l"(pointer), "r"(rank)),
      mapped = static_cast<T*>(simt::model::map_rank(static_cast<void*>(pointer), rank, site)));
  return mapped;
}

// ---- threads ----
// True in one lane of the warp, the same one each time. All lanes must call it.
PTX_INLINE bool elect_sync(SIMT_SITE_ONLY) {
  uint32_t elected;
  PTX(asm volatile("{\n.reg .pred p;\nelect.sync _|p, 0xffffffff;\nselp.u32 %0, 1, 0, p;\n}" : "=r"(elected)),
      elected = simt::model::elect(~0u, site));
  return elected;
}
// A value that all lanes have, in a register the compiler knows to be the same in all of them.
PTX_INLINE uint32_t uniform(uint32_t value SIMT_SITE) {
  PTX(return __shfl_sync(0xffffffff, value, 0), return __shfl_sync(0xffffffff, value, 0, 32, site));
}
// Registers per thread from here on: the warpgroup gives some back, or waits until there are enough.
template <int registers>
PTX_INLINE void setmaxnreg_inc(SIMT_SITE_ONLY) {
  static_assert(registers >= 24 && registers <= 256 && registers % 8 == 0, "setmaxnreg takes 24..256 in steps of 8");
  PTX(asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(registers)),
      simt::model::set_registers(registers, true, site));
}
template <int registers>
PTX_INLINE void setmaxnreg_dec(SIMT_SITE_ONLY) {
  static_assert(registers >= 24 && registers <= 256 && registers % 8 == 0, "setmaxnreg takes 24..256 in steps of 8");
  PTX(asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(registers)),
      simt::model::set_registers(registers, false, site));
}

// ---- programmatic dependent launch: the model runs one grid after the other, so there is nothing to wait for ----
PTX_INLINE void griddepcontrol_wait() { PTX(asm volatile("griddepcontrol.wait;" ::: "memory"), (void)0); }
PTX_INLINE void griddepcontrol_launch_dependents() {
  PTX(asm volatile("griddepcontrol.launch_dependents;"), (void)0);
}

// ---- memory that other blocks write while this one runs ----
PTX_INLINE uint32_t load_acquire(const uint32_t* pointer SIMT_SITE) {
  uint32_t value;
  PTX(asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(pointer) : "memory"),
      value = simt::model::load_acquire(pointer, site));
  return value;
}
PTX_INLINE void store_release(uint32_t* pointer, uint32_t value SIMT_SITE) {
  PTX(asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(pointer), "r"(value) : "memory"),
      simt::model::store_release(pointer, value, site));
}

// atomicAdd whose old value nobody wants. Next to a fence the compiler would ask for it all the same.
PTX_INLINE void red_add(float* pointer, float x SIMT_SITE) {
  PTX(asm volatile("red.relaxed.gpu.global.add.f32 [%0], %1;" ::"l"(pointer), "f"(x) : "memory"),
      atomicAdd(pointer, x, site));
}

// ---- 16-byte global accesses with a cache policy ----
// Of what nobody writes while the grid runs, where `inside`, else zeros: under a predicate. A branch around each load
// would let one wait for the other.
PTX_INLINE uint4 load_nc_v4_if(bool inside, const void* pointer) {
  uint4 v = {0, 0, 0, 0};
  PTX(asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %5, 0;\n"
                   "@p ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];\n}"
                   : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w)
                   : "l"(pointer), "r"(int(inside))),
      if (inside) v = *static_cast<const uint4*>(pointer));
  return v;
}
// As *pointer, which nvcc may split.
PTX_INLINE uint4 load_v4(const void* pointer) {
  uint4 v;
  PTX(asm volatile("ld.global.v4.u32 {%0,%1,%2,%3}, [%4];"
                   : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                   : "l"(pointer)
                   : "memory"),
      v = *static_cast<const uint4*>(pointer));
  return v;
}
PTX_INLINE void store_v4(void* pointer, uint4 v) {
  PTX(asm volatile("st.global.v4.u32 [%0], {%1,%2,%3,%4};" ::"l"(pointer), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
                   : "memory"),
      *static_cast<uint4*>(pointer) = v);
}
PTX_INLINE void store_streaming_v2(void* pointer, float x, float y) {
  PTX(asm volatile("st.global.cs.v2.f32 [%0], {%1,%2};" ::"l"(pointer), "f"(x), "f"(y) : "memory"),
      *static_cast<float2*>(pointer) = make_float2(x, y));
}

// ---- two floats as one register of two halves: `low` in bits 0-15 ----
PTX_INLINE uint32_t pack_bf16(float low, float high) {
  uint32_t pair;
  PTX(asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low)),
      pair = uint32_t(simt::bf16_bits(low)) | uint32_t(simt::bf16_bits(high)) << 16);
  return pair;
}
PTX_INLINE uint32_t pack_f16(float low, float high) {
  uint32_t pair;
  PTX(asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low)),
      pair = uint32_t(simt::f16_bits(low)) | uint32_t(simt::f16_bits(high)) << 16);
  return pair;
}
PTX_INLINE float exp2_approx(float x) {
  float y;
  PTX(asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)), y = std::exp2(x));
  return y;
}
PTX_INLINE float tanh_approx(float x) {
  float y;
  PTX(asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x)), y = std::tanh(x));
  return y;
}

}  // namespace ptx
