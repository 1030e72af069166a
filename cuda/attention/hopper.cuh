// What the Hopper steps of attention share: tensors described to TMA, tiles in shared memory, the products of wgmma.
//
// A tile of `rows` x K elements lies in boxes of 64 columns, one after the other: rows of 128 bytes, swizzled by 128. K = 96
// fills the second box by half; TMA writes zeros there. As an operand that is multiplied along K (Q, K in q k') it is K-major;
// as one that is multiplied along its rows (V in p v; K, Q, dO in the backward pass) it is MN-major. 8 rows are 1024 bytes,
// so a tile may be cut at any multiple of 8 rows.
#pragma once
#include "attention/softmax.cuh"

namespace attention::hopper {

constexpr int warpgroup = 128;  // threads

constexpr int boxes_of(int head_dim) { return (head_dim + 63) / 64; }
constexpr int tile_elements(int rows, int head_dim) { return rows * 64 * boxes_of(head_dim); }
constexpr int tile_bytes(int rows, int head_dim) { return 2 * tile_elements(rows, head_dim); }

// ---- host: q, k, v, o or a gradient as TMA sees it: columns, rows, heads, batch; a box is `rows` of 64 columns ----
// Where lengths vary, the rows are those of all sequences: a box may reach into the next one.
inline CUtensorMap tensor_map(const Tensor& x, const Problem& p, int rows_of_tensor, int heads, int rows) {
  const bool packed = p.starts_q != nullptr;
  const uint64_t row = 2 * uint64_t(p.head_dim);  // of a dimension of size 1: any stride that no row would overlap
  const auto bytes = [&](int64_t stride) { return stride ? 2 * uint64_t(stride) : row; };
  const simt::TensorShape shape{4,
                                {uint64_t(p.head_dim), uint64_t(rows_of_tensor), uint64_t(heads), uint64_t(packed ? 1 : p.batch)},
                                {bytes(x.row), bytes(x.head), bytes(x.batch)},
                                {64, uint32_t(rows), 1, 1}};
  return simt::tensor_map(x.data, p.type, shape, simt::Swizzle::b128, simt::L2Promotion::b256);
}
inline CUtensorMap query_map(const Tensor& x, const Problem& p, int rows) {  // q, o, do, dq
  return tensor_map(x, p, p.starts_q ? p.total_queries : p.queries, p.heads, rows);
}
inline CUtensorMap key_map(const Tensor& x, const Problem& p, int rows) {  // k, v, dk, dv
  return tensor_map(x, p, p.starts_k ? p.total_keys : p.keys, p.kv_heads, rows);
}

// ---- one thread: rows row .. row + rows - 1 of a head; tile_bytes(rows, head_dim) count on `full` ----
template <int rows, int head_dim, class T>
PTX_INLINE void load_tile(T* to, const CUtensorMap* map, uint64_t* full, int row, int head, int batch,
                          ptx::CacheHint hint = ptx::CacheHint::evict_normal) {
  static_assert(rows % 8 == 0 && rows <= 256, "whole swizzle patterns, one box");
#pragma unroll
  for (int box = 0; box < boxes_of(head_dim); ++box)
    ptx::tma_load_hint(to + box * rows * 64, map, full, hint, box * 64, row, head, batch);
}

// ---- operands in shared memory: `tile` has `rows` rows, the operand starts at its row `first` ----
template <int rows, class T>
PTX_INLINE uint64_t k_major(const T* tile, int first = 0) {  // + k_step<rows>(i) for columns 16 i ..
  return ptx::matrix_descriptor(tile + first * 64, simt::Swizzle::b128, 16, 1024);
}
template <int rows>
PTX_INLINE constexpr uint64_t k_step(int i) { return uint64_t(i / 4 * rows * 128 + i % 4 * 32) >> 4; }
template <int rows, class T>
PTX_INLINE uint64_t mn_major(const T* tile, int first = 0) {  // + mn_step(i) for rows 16 i ..
  return ptx::matrix_descriptor(tile + first * 64, simt::Swizzle::b128, rows * 128, 1024);
}
PTX_INLINE constexpr uint64_t mn_step(int i) { return uint64_t(i * 2048) >> 4; }

// d (64 x n) = or += a b' along the head: 64 rows of tile `a` from row first_a on, n rows of tile `b` from first_b on.
// Issued, neither committed nor waited for.
template <int n, int rows_a, int rows_b, int head_dim, class T>
PTX_INLINE void multiply_along_head(float (&d)[n / 2], const T* a, int first_a, const T* b, int first_b, bool accumulate = false) {
  const uint64_t left = k_major<rows_a>(a, first_a), right = k_major<rows_b>(b, first_b);
#pragma unroll
  for (int i = 0; i < head_dim / 16; ++i)
    ptx::wgmma<n, T>(d, left + k_step<rows_a>(i), right + k_step<rows_b>(i), accumulate || i > 0);
}
// d (64 x head_dim) = or += a b along `keys` rows of tile `b`: a from registers (see to_operand), 64 x keys.
template <int keys, int rows_b, int head_dim, class T>
PTX_INLINE void multiply_along_rows(float (&d)[head_dim / 2], const uint32_t (&a)[keys / 16][4], const T* b, int first_b,
                                    bool accumulate = true) {
  const uint64_t right = mn_major<rows_b>(b, first_b);
#pragma unroll
  for (int i = 0; i < keys / 16; ++i)
    ptx::wgmma<head_dim, T, true>(d, a[i], right + mn_step(i), accumulate || i > 0);
}

// ---- the ring of stages ----
template <int stages>
struct Cursor {
  int stage = 0;
  uint32_t parity = 0;  // a consumer waits for it on a full barrier, a producer for the other one on an empty barrier
  PTX_INLINE void advance() {
    if (++stage == stages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// ---- a warpgroup's 64 x head_dim accumulators to rows row .. row + 63 of a head, of which `rows_left` exist ----
template <int head_dim, class T>
PTX_INLINE void store_rows(const float (&d)[head_dim / 2], T* first_row, int64_t row_stride, int rows_left) {
  const int thread = threadIdx.x % warpgroup, lane = thread % 32, row = 16 * (thread / 32) + lane / 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (row + 8 * half >= rows_left) continue;
    T* const to = first_row + (row + 8 * half) * row_stride + 2 * (lane % 4);
#pragma unroll
    for (int i = 2 * half; i < head_dim / 2; i += 4)
      *reinterpret_cast<uint32_t*>(to + 8 * (i / 4)) = pack<T>(d[i], d[i + 1]);
  }
}

}  // namespace attention::hopper
