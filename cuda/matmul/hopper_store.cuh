// The two ways from accumulators to memory in the Hopper steps: by the threads, each to its own places (09-14), and
// through shared memory by TMA (15, 16). Both apply the epilogue, and neither writes outside of d.
#pragma once
#include "matmul/hopper.cuh"

namespace matmul::hopper {

// ---- from accumulators to global memory, without a detour ----
template <class Out>
PTX_INLINE uint32_t pack(float low, float high) {
  if constexpr (std::is_same_v<Out, __half>) return ptx::pack_f16(low, high);
  else return ptx::pack_bf16(low, high);
}

// A warpgroup's 64 x n accumulators to the tile at (row, column); they are spent afterwards. A quad of lanes writes 8
// neighbouring columns.
template <int n, class T>
PTX_INLINE void store_fragment(const Epilogue<T, T>& epilogue, float (&d)[n / 2], int batch, int row, int column) {
  const int thread = threadIdx.x % warpgroup, lane = thread % 32;
  row += 16 * (thread / 32) + lane / 4;
  column += 2 * (lane % 4);
  if (epilogue.plain() && epilogue.pairs()) {
    T* corner = epilogue.d + batch * epilogue.stride_d + row * epilogue.ldd + column;
#pragma unroll
    for (int i = 0; i < n / 2; i += 2) {
      const int down = 8 * (i / 2 % 2), right = 8 * (i / 4);
      if (row + down < epilogue.m && column + right < epilogue.n)
        *reinterpret_cast<uint32_t*>(corner + down * epilogue.ldd + right) = pack<T>(d[i], d[i + 1]);
    }
    return;
  }
  // An activation unrolled 64 times takes ptxas minutes. So the sums pass by: each turn stores the first 16 columns and
  // moves the others down.
  constexpr int turn = 8;
#pragma unroll 1
  for (int right = 0; right < n; right += 2 * turn) {
#pragma unroll
    for (int i = 0; i < turn; i += 2)
      epilogue.store_pair(batch, row + 8 * (i / 2 % 2), column + right + 8 * (i / 4), d[i], d[i + 1]);
#pragma unroll
    for (int i = 0; i + turn < n / 2; ++i) d[i] = d[i + turn];
  }
}

// ---- from accumulators to global memory, by TMA ----
// A warp has boxes of its own: 16 rows of 128 bytes, swizzled as the map of d says. So no warp waits for another: it
// fills a box while TMA still reads the one before, and goes on to the next tile while TMA stores.
template <int count_>
struct Boxes {
  static constexpr int count = count_, bytes = 16 * 128;
  alignas(1024) unsigned char box[count][bytes];
};

// TMA stores what it can describe, of two bytes an element; Epilogue::plain() says whether there is nothing else to do.
inline bool output_describable(const Problem& p) {
  const int64_t batch_stride = p.batch > 1 ? p.stride_d : 0;
  return simt::size_of(p.out) == 2 && (int64_t(uintptr_t(p.d)) | p.ldd * 2 | batch_stride * 2) % 16 == 0 &&
         (p.batch == 1 || p.stride_d != 0);
}
// Elements that no TMA store will touch get a map all the same: kernels take one.
inline CUtensorMap output_map(const Problem& p) {
  if (!output_describable(p)) return CUtensorMap{};
  return matrix_map(p.d, p.out, p.m, p.n, p.ldd, p.batch, p.batch > 1 ? p.stride_d : 0, 16, 64);
}

// Element (row, byte) of a box. Each 16 bytes of a row change places with others, differently in each of 8 rows.
PTX_INLINE unsigned char* in_box(unsigned char* box, int row, int byte) {
  return box + row * 128 + (byte ^ (row % 8 << 4));
}
// The same for floats, which no TMA store reads. A quad of lanes writes 32 bytes of a row at once, so four neighbouring
// rows change places by 32 bytes; rows 4-7 by 16 bytes besides.
PTX_INLINE unsigned char* in_float_box(unsigned char* box, int row, int byte) {
  return box + row * 128 + (byte ^ (row % 4 << 5 | (row / 4 % 2) << 4));
}

// 32 accumulators of each lane, 64 columns of the warp's 16 rows, into a box.
template <class T, int registers>
PTX_INLINE void fill_box(unsigned char* box, const float (&d)[registers], int first) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < 32; i += 8) {  // 16 columns: four 8 x 8 matrices, in the order that lanes 8q + i point at rows
    const float* x = d + first + i;
    const uint32_t four[4] = {pack<T>(x[0], x[1]), pack<T>(x[2], x[3]), pack<T>(x[4], x[5]), pack<T>(x[6], x[7])};
    ptx::stmatrix_x4(in_box(box, lane % 16, i * 4 + lane / 16 * 16), four);
  }
}
// 16 accumulators of each lane, 32 columns of the warp's 16 rows, into a box.
template <int registers>
PTX_INLINE void fill_float_box(unsigned char* box, const float (&d)[registers], int first) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < 16; i += 2)
    *reinterpret_cast<float2*>(in_float_box(box, lane / 4 + 8 * (i / 2 % 2), 32 * (i / 4) + 8 * (lane % 4))) =
        make_float2(d[first + i], d[first + i + 1]);
}

// A warp's 16 x n accumulators to d at (row, column). Lane 0 starts the stores and alone can wait for them.
template <int n, class T, int count>
PTX_INLINE void store_boxes(const CUtensorMap* map, Boxes<count>& boxes, const float (&d)[n / 2], int row, int column,
                            int batch, ptx::CacheHint hint = ptx::CacheHint::evict_normal) {
  constexpr int columns = 64, stores = n / columns;
  constexpr int ring = stores % count == 0 ? count : 1;  // the next tile must find the boxes' turns as this one did
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < stores; ++i) {
    unsigned char* const box = boxes.box[i % ring];
    if (lane == 0) ptx::bulk_wait_group_read<ring - 1>();  // the box's last store has read it
    __syncwarp();
    fill_box<T>(box, d, i * columns / 2);
    ptx::fence_proxy_async();  // each lane makes its own writes visible to TMA
    __syncwarp();
    if (lane == 0) {
      ptx::tma_store_hint(map, box, hint, column + i * columns, row, batch);
      ptx::bulk_commit_group();
    }
  }
}

// The same for whatever TMA does not do: a d it cannot describe, and all that an epilogue computes. Sums pass through
// the boxes as floats, 32 columns in each, and come back as 8 neighbours, so that memory is read and written in long
// pieces and the epilogue's code exists once. Stores columns `first` to `last` of the n.
template <int n, int count, class Ending>
PTX_INLINE void store_through_boxes(const Ending& epilogue, Boxes<count>& boxes, const float (&d)[n / 2], int row,
                                    int column, int batch, int first = 0, int last = n) {
  constexpr int turn = 32 * count, parts = 4 * count;  // columns of all boxes; how many 8 they are
  const int lane = threadIdx.x % 32;
#pragma unroll 1
  for (int right = first / turn * turn; right < last; right += turn) {
    __syncwarp();
#pragma unroll
    for (int i = 0; i < n; i += 32)
      if (i / turn * turn == right) fill_float_box(boxes.box[i / 32 % count], d, i / 2);
    __syncwarp();
#pragma unroll 1
    for (int i = lane; i < 16 * parts; i += 32) {
      const int down = i / parts, part = i % parts, across = right + part * 8;
      if (across < first || across >= last) continue;
      float x[8];
#pragma unroll
      for (int j = 0; j < 8; j += 4) {
        const unsigned char* const from = in_float_box(boxes.box[part / 4], down, part % 4 * 32 + j * 4);
        const float4 four = *reinterpret_cast<const float4*>(from);
        x[j] = four.x, x[j + 1] = four.y, x[j + 2] = four.z, x[j + 3] = four.w;
      }
      epilogue.store_run(batch, row + down, column + across, x);
    }
  }
}

}  // namespace matmul::hopper
