// The kernels of layouts.h: each moves an image between global and shared memory around one instruction.
#include "layouts.h"

#include <stdexcept>
#include <string>

#include "simt/ptx.cuh"

namespace layouts {
namespace {

struct Shared {
  alignas(1024) uint32_t image[image_bytes / 4];
  uint64_t barrier;
};

// ---- between global and shared memory, by all threads of the block --------------------------------------------------
PTX_INLINE void fill(Shared& shared, const uint32_t* image, int bytes) {
  for (int i = threadIdx.x; i < bytes / 4; i += blockDim.x) shared.image[i] = image[i];
  ptx::fence_proxy_async();  // TMA and wgmma read, or write over, what these threads have written
}
PTX_INLINE void show(const Shared& shared, uint32_t* image, int bytes) {
  for (int i = threadIdx.x; i < bytes / 4; i += blockDim.x) image[i] = shared.image[i];
}
PTX_INLINE char* at(Shared& shared, int offset) { return reinterpret_cast<char*>(shared.image) + offset; }

// ---- TMA ------------------------------------------------------------------------------------------------------------
struct Place {  // of the box, as a kernel needs it
  int rank, c[5], offset;
  uint32_t bytes;
};

PTX_INLINE void load_box(void* to, const CUtensorMap* map, uint64_t* barrier, const Place& p) {
  switch (p.rank) {
    case 1: return ptx::tma_load(to, map, barrier, p.c[0]);
    case 2: return ptx::tma_load(to, map, barrier, p.c[0], p.c[1]);
    case 3: return ptx::tma_load(to, map, barrier, p.c[0], p.c[1], p.c[2]);
    case 4: return ptx::tma_load(to, map, barrier, p.c[0], p.c[1], p.c[2], p.c[3]);
    default: return ptx::tma_load(to, map, barrier, p.c[0], p.c[1], p.c[2], p.c[3], p.c[4]);
  }
}
PTX_INLINE void store_box(const CUtensorMap* map, const void* from, const Place& p) {
  switch (p.rank) {
    case 1: return ptx::tma_store(map, from, p.c[0]);
    case 2: return ptx::tma_store(map, from, p.c[0], p.c[1]);
    case 3: return ptx::tma_store(map, from, p.c[0], p.c[1], p.c[2]);
    case 4: return ptx::tma_store(map, from, p.c[0], p.c[1], p.c[2], p.c[3]);
    default: return ptx::tma_store(map, from, p.c[0], p.c[1], p.c[2], p.c[3], p.c[4]);
  }
}
PTX_INLINE void add_box(const CUtensorMap* map, const void* from, const Place& p) {
  switch (p.rank) {
    case 1: return ptx::tma_reduce_add(map, from, p.c[0]);
    case 2: return ptx::tma_reduce_add(map, from, p.c[0], p.c[1]);
    case 3: return ptx::tma_reduce_add(map, from, p.c[0], p.c[1], p.c[2]);
    case 4: return ptx::tma_reduce_add(map, from, p.c[0], p.c[1], p.c[2], p.c[3]);
    default: return ptx::tma_reduce_add(map, from, p.c[0], p.c[1], p.c[2], p.c[3], p.c[4]);
  }
}

// Were fewer bytes to come than announced, a test shall fail and not hang the GPU.
PTX_INLINE void wait_or_give_up(uint64_t* barrier) {
  for (int tries = 0; tries < 1000000 && !ptx::mbarrier_try_wait(barrier, 0); ++tries) {}
}

__global__ void tma_load_kernel(const __grid_constant__ CUtensorMap map, Place place, uint32_t* image, int bytes) {
  Shared& shared = simt::dynamic_shared<Shared>();
  fill(shared, image, bytes);
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(&shared.barrier, 1);
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    ptx::mbarrier_arrive_expect_tx(&shared.barrier, place.bytes);
    load_box(at(shared, place.offset), &map, &shared.barrier, place);
  }
  wait_or_give_up(&shared.barrier);
  show(shared, image, bytes);
}

__global__ void tma_store_kernel(const __grid_constant__ CUtensorMap map, Place place, const uint32_t* image, int bytes,
                                 bool add) {
  Shared& shared = simt::dynamic_shared<Shared>();
  fill(shared, image, bytes);
  __syncthreads();
  if (threadIdx.x == 0) {
    if (add) add_box(&map, at(shared, place.offset), place);
    else store_box(&map, at(shared, place.offset), place);
    ptx::bulk_commit_group();
    ptx::bulk_wait_group<0>();
  }
}

__global__ void tma_multicast_kernel(const __grid_constant__ CUtensorMap map, Place place, uint32_t* images, int bytes,
                                     int source, int mask) {
  Shared& shared = simt::dynamic_shared<Shared>();
  const int rank = ptx::cluster_rank();
  uint32_t* image = images + rank * (bytes / 4);
  fill(shared, image, bytes);
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(&shared.barrier, 1);
    ptx::fence_mbarrier_init();
  }
  ptx::cluster_sync();
  if (threadIdx.x == 0 && (mask >> rank & 1)) ptx::mbarrier_arrive_expect_tx(&shared.barrier, place.bytes);
  if (threadIdx.x == 0 && rank == source)
    ptx::tma_load_multicast(at(shared, place.offset), &map, &shared.barrier, uint16_t(mask), place.c[0], place.c[1]);
  if (mask >> rank & 1) wait_or_give_up(&shared.barrier);
  ptx::cluster_sync();  // blocks outside of the mask, too, show what they hold when all is done
  show(shared, image, bytes);
}

__global__ void cluster_ring_kernel(uint32_t* received, uint32_t* tested) {
  Shared& shared = simt::dynamic_shared<Shared>();
  const uint32_t rank = ptx::cluster_rank(), next = (rank + 1) % ptx::cluster_size(), lane = threadIdx.x;
  if (lane == 0) {
    ptx::mbarrier_init(&shared.barrier, 32 + rank);  // each block another number: its own arrivals would not do
    ptx::fence_mbarrier_init();
    tested[2 * rank] = ptx::mbarrier_try_wait(&shared.barrier, 0);
    tested[2 * rank + 1] = ptx::mbarrier_try_wait(&shared.barrier, 1);
  }
  ptx::cluster_sync();
  *ptx::map_shared_rank(&shared.image[lane], next) = 100 * rank + lane;
  ptx::mbarrier_arrive_remote(&shared.barrier, next);
  if (lane < next) ptx::mbarrier_arrive_remote(&shared.barrier, next);
  ptx::mbarrier_wait_cluster(&shared.barrier, 0);
  received[32 * rank + lane] = shared.image[lane];
  ptx::cluster_sync();  // no block leaves while another may still arrive on its barrier
}

// ---- one warp -------------------------------------------------------------------------------------------------------
template <int matrices, bool transpose>
PTX_INLINE void load_matrices(uint32_t (&r)[matrices], const void* row) {
  if constexpr (matrices == 1) ptx::ldmatrix_x1<transpose>(r, row);
  else if constexpr (matrices == 2) ptx::ldmatrix_x2<transpose>(r, row);
  else ptx::ldmatrix_x4<transpose>(r, row);
}
template <int matrices, bool transpose>
__global__ void ldmatrix_kernel(const uint32_t* image, int bytes, const uint32_t* offsets, uint32_t* registers) {
  Shared& shared = simt::dynamic_shared<Shared>();
  fill(shared, image, bytes);
  __syncthreads();
  uint32_t r[matrices];
  load_matrices<matrices, transpose>(r, at(shared, offsets[threadIdx.x]));
  for (int i = 0; i < matrices; ++i) registers[threadIdx.x * matrices + i] = r[i];
}

template <int matrices, bool transpose>
__global__ void stmatrix_kernel(uint32_t* image, int bytes, const uint32_t* offsets, const uint32_t* registers) {
  Shared& shared = simt::dynamic_shared<Shared>();
  fill(shared, image, bytes);
  __syncthreads();
  uint32_t r[matrices];
  for (int i = 0; i < matrices; ++i) r[i] = registers[threadIdx.x * matrices + i];
  void* row = at(shared, offsets[threadIdx.x]);
  if constexpr (matrices == 2) ptx::stmatrix_x2<transpose>(row, r);
  else ptx::stmatrix_x4<transpose>(row, r);
  __syncthreads();
  show(shared, image, bytes);
}

template <class T>
__global__ void mma_kernel(const uint32_t* a, const uint32_t* b, const float* c, float* d) {
  const int lane = threadIdx.x;
  uint32_t ra[4], rb[2];
  float rc[4], rd[4];
  for (int i = 0; i < 4; ++i) ra[i] = a[4 * lane + i], rc[i] = c[4 * lane + i];
  for (int i = 0; i < 2; ++i) rb[i] = b[2 * lane + i];
  ptx::mma_m16n8k16<T>(rd, ra, rb, rc);
  for (int i = 0; i < 4; ++i) d[4 * lane + i] = rd[i];
}

// ---- one warpgroup --------------------------------------------------------------------------------------------------
template <int n, class T, bool a_mn_major, bool b_mn_major>
__global__ void __launch_bounds__(128) wgmma_shared_kernel(Product p, Operand a, Operand b, const uint32_t* image,
                                                           int bytes, float* result, uint64_t* descriptors) {
  Shared& shared = simt::dynamic_shared<Shared>();
  fill(shared, image, bytes);
  const uint64_t first_a = ptx::matrix_descriptor(at(shared, a.offset), p.swizzle, a.leading, a.stride);
  const uint64_t first_b = ptx::matrix_descriptor(at(shared, b.offset), p.swizzle, b.leading, b.stride);
  if (threadIdx.x == 0) {
    descriptors[0] = ptx::shared_address(shared.image);
    descriptors[1] = first_a;
    descriptors[2] = first_b;
  }
  float d[n / 2];
#pragma unroll
  for (int i = 0; i < n / 2; ++i) d[i] = result[threadIdx.x * (n / 2) + i];
  __syncthreads();
  for (int step = 0; step < p.steps; ++step) {
    ptx::wgmma_fence();
    ptx::wgmma<n, T, a_mn_major, b_mn_major>(d, first_a + (a.step[step] >> 4), first_b + (b.step[step] >> 4),
                                             p.accumulate || step > 0);
    ptx::wgmma_commit_group();
    ptx::wgmma_wait_group<0>();
  }
#pragma unroll
  for (int i = 0; i < n / 2; ++i) result[threadIdx.x * (n / 2) + i] = d[i];
}

template <int n, class T, bool b_mn_major>
__global__ void __launch_bounds__(128) wgmma_registers_kernel(Product p, const uint32_t* a, Operand b,
                                                              const uint32_t* image, int bytes, float* result) {
  Shared& shared = simt::dynamic_shared<Shared>();
  fill(shared, image, bytes);
  const uint64_t first_b = ptx::matrix_descriptor(at(shared, b.offset), p.swizzle, b.leading, b.stride);
  float d[n / 2];
#pragma unroll
  for (int i = 0; i < n / 2; ++i) d[i] = result[threadIdx.x * (n / 2) + i];
  __syncthreads();
  for (int step = 0; step < p.steps; ++step) {
    uint32_t r[4];
    for (int i = 0; i < 4; ++i) r[i] = a[(step * 128 + threadIdx.x) * 4 + i];
    ptx::wgmma_fence();
    ptx::wgmma<n, T, b_mn_major>(d, r, first_b + (b.step[step] >> 4), p.accumulate || step > 0);
    ptx::wgmma_commit_group();
    ptx::wgmma_wait_group<0>();
  }
#pragma unroll
  for (int i = 0; i < n / 2; ++i) result[threadIdx.x * (n / 2) + i] = d[i];
}

// ---- host -----------------------------------------------------------------------------------------------------------
simt::Launch shape_of(unsigned threads, unsigned blocks = 1) {
  simt::Launch launch{dim3(blocks), dim3(threads)};
  launch.shared_bytes = sizeof(Shared);
  launch.cluster = blocks;
  return launch;
}
CUtensorMap map_of(const Box& box) { return simt::tensor_map(box.tensor, box.type, box.shape, box.swizzle); }
Place place_of(const Box& box) {
  const int* c = box.coordinates;
  return {box.shape.rank, {c[0], c[1], c[2], c[3], c[4]}, box.offset, box.bytes};
}

// call(std::integral_constant<int, n>) for the n that are compiled.
template <class Call>
void for_n(int n, Call call) {
  switch (n) {
    case 8: return call(std::integral_constant<int, 8>());
    case 24: return call(std::integral_constant<int, 24>());
    case 64: return call(std::integral_constant<int, 64>());
    case 128: return call(std::integral_constant<int, 128>());
    case 256: return call(std::integral_constant<int, 256>());
    default: throw std::invalid_argument("n " + std::to_string(n) + ": expected one of 8, 24, 64, 128, 256");
  }
}
template <class Call>
void for_bool(bool value, Call call) {
  value ? call(std::true_type()) : call(std::false_type());
}

}  // namespace

void tma_load(const Box& box, void* image, int bytes) {
  simt::launch(tma_load_kernel, shape_of(128), map_of(box), place_of(box), static_cast<uint32_t*>(image), bytes);
}
void tma_store(const Box& box, const void* image, int bytes, bool add) {
  simt::launch(tma_store_kernel, shape_of(128), map_of(box), place_of(box), static_cast<const uint32_t*>(image), bytes,
               add);
}
void tma_multicast(const Box& box, void* images, int bytes, int blocks, int source, int mask) {
  if (box.shape.rank != 2) throw std::invalid_argument("multicast: expected a tensor of rank 2");
  simt::launch(tma_multicast_kernel, shape_of(128, blocks), map_of(box), place_of(box), static_cast<uint32_t*>(images),
               bytes, source, mask);
}
void cluster_ring(uint32_t* received, uint32_t* tested, int blocks) {
  simt::launch(cluster_ring_kernel, shape_of(32, blocks), received, tested);
}

void ldmatrix(const void* image, int bytes, const uint32_t* offsets, int matrices, bool transpose,
              uint32_t* registers) {
  void (*kernel)(const uint32_t*, int, const uint32_t*, uint32_t*) = nullptr;
  if (matrices == 1) kernel = transpose ? ldmatrix_kernel<1, true> : ldmatrix_kernel<1, false>;
  else if (matrices == 2) kernel = transpose ? ldmatrix_kernel<2, true> : ldmatrix_kernel<2, false>;
  else if (matrices == 4) kernel = transpose ? ldmatrix_kernel<4, true> : ldmatrix_kernel<4, false>;
  else throw std::invalid_argument("ldmatrix of " + std::to_string(matrices) + ": expected 1, 2 or 4 matrices");
  simt::launch(kernel, shape_of(32), static_cast<const uint32_t*>(image), bytes, offsets, registers);
}
void stmatrix(void* image, int bytes, const uint32_t* offsets, int matrices, bool transpose,
              const uint32_t* registers) {
  void (*kernel)(uint32_t*, int, const uint32_t*, const uint32_t*) = nullptr;
  if (matrices == 2) kernel = transpose ? stmatrix_kernel<2, true> : stmatrix_kernel<2, false>;
  else if (matrices == 4) kernel = transpose ? stmatrix_kernel<4, true> : stmatrix_kernel<4, false>;
  else throw std::invalid_argument("stmatrix of " + std::to_string(matrices) + ": expected 2 or 4 matrices");
  simt::launch(kernel, shape_of(32), static_cast<uint32_t*>(image), bytes, offsets, registers);
}
void mma_m16n8k16(bool f16, const uint32_t* a, const uint32_t* b, const float* c, float* d) {
  simt::launch(f16 ? mma_kernel<__half> : mma_kernel<__nv_bfloat16>, shape_of(32), a, b, c, d);
}

void wgmma_shared(const Product& p, const Operand& a, const Operand& b, const void* image, int bytes, float* d,
                  uint64_t* descriptors) {
  for_n(p.n, [&](auto n) {
    for_bool(a.mn_major, [&](auto a_mn) {
      for_bool(b.mn_major, [&](auto b_mn) {
        auto kernel = wgmma_shared_kernel<n.value, __nv_bfloat16, a_mn.value, b_mn.value>;
        if (p.f16) {
          if constexpr (n.value == 64) kernel = wgmma_shared_kernel<64, __half, a_mn.value, b_mn.value>;
          else throw std::invalid_argument("f16 with n " + std::to_string(p.n) + ": expected n 64");
        }
        simt::launch(kernel, shape_of(128), p, a, b, static_cast<const uint32_t*>(image), bytes, d, descriptors);
      });
    });
  });
}
void wgmma_registers(const Product& p, const uint32_t* a, const Operand& b, const void* image, int bytes, float* d) {
  for_n(p.n, [&](auto n) {
    for_bool(b.mn_major, [&](auto b_mn) {
      auto kernel = wgmma_registers_kernel<n.value, __nv_bfloat16, b_mn.value>;
      if (p.f16) {
        if constexpr (n.value == 64) kernel = wgmma_registers_kernel<64, __half, b_mn.value>;
        else throw std::invalid_argument("f16 with n " + std::to_string(p.n) + ": expected n 64");
      }
      simt::launch(kernel, shape_of(128), p, a, b, static_cast<const uint32_t*>(image), bytes, d);
    });
  });
}

}  // namespace layouts
