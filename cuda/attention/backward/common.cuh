// What the steps of the backward ladder share: how kernels see its inputs, the grid, and dq's sums in float32.
//
//   p_ij = exp(s_ij - lse_i)      dv_j = sum_i p_ij do_i       ds_ij = p_ij (do_i . v_j - delta_i) slope_ij scale
//                                 dk_j = sum_i ds_ij q_i       dq_i  = sum_j ds_ij k_j
//
// A block that owns keys has whole sums of dk and dv, but only a part of each dq. These parts meet in `dq_sum`, where
// every head has `sum_rows` rows. A sequence starts at a multiple of 64 there, so that no tile of 64 queries holds rows
// of two of them. A step clears the sums, adds to them in any order of elements, and has them written to dq.
#pragma once
#include "attention/softmax.cuh"

namespace attention::backward {

// What every kernel of the backward pass reads.
template <class T>
struct Inputs {
  Rows<const T> q, k, v, d_o;
  const float *lse, *delta;
  int64_t lse_batch, lse_head;
  Sizes sizes;
  Rules rules;

  static Inputs of(const Backward& x) {
    const Problem& p = x.forward;
    return {Rows<const T>::of(p.q), Rows<const T>::of(p.k), Rows<const T>::of(p.v), Rows<const T>::of(x.d_o),
            p.lse, x.delta, p.lse_batch, p.lse_head, Sizes::of(p), Rules::of(p)};
  }
  // Where lse and delta have a query, counted like the rows of Q.
  __device__ __forceinline__ int64_t statistic(int b, int row, int head) const {
    return b * lse_batch + head * lse_head + row;
  }
};

// One block for each tile, head and member of the batch. Blocks start in the order of their tiles.
inline dim3 grid_of(int tiles, int heads, int batch) {
  if (heads > 65535 || batch > 65535)
    refuse(std::to_string(batch) + " sequences of " + std::to_string(heads) + " heads: expected at most 65535 of each");
  return dim3(tiles, heads, batch);
}

// ---- dq_sum ----
constexpr int sum_tile = 64;  // queries

__host__ __device__ constexpr int64_t sum_rows(int64_t total_queries, int batch) {
  return (total_queries / sum_tile + batch) * sum_tile;
}
// The first row of a sequence. Each sequence before it has rounded the sum up by less than a tile.
__device__ __forceinline__ int64_t first_sum_row(const Sizes& sizes, const Sequence& s, int b) {
  const int64_t before = sizes.starts_q ? s.first_query : int64_t(b) * sizes.queries;
  return (before / sum_tile + b) * sum_tile;
}

// Sums in patches of 16 x 8, as mma.sync and wgmma leave them to a warp: register by register, lane by lane. So a warp
// that adds a register to memory touches 128 bytes in one piece. `tile` starts at a multiple of 16 rows.
struct Patches {
  static __device__ __forceinline__ int64_t patch(int row, int column, int head_dim) {
    return (int64_t(row / 16) * (head_dim / 8) + column / 8) * 128;
  }
  // Eight neighbours of a row, from a multiple of 8 on: the four lanes that share them have one column of a pair in
  // register i and the other in register i + 1.
  static __device__ __forceinline__ void read(const float* tile, int row, int column, int head_dim, float (&x)[8]) {
    const float* const from = tile + patch(row, column, head_dim) + row % 16 / 8 * 64 + row % 8 * 4;
    const float4 even = *reinterpret_cast<const float4*>(from), odd = *reinterpret_cast<const float4*>(from + 32);
    x[0] = even.x, x[2] = even.y, x[4] = even.z, x[6] = even.w;
    x[1] = odd.x, x[3] = odd.y, x[5] = odd.z, x[7] = odd.w;
  }
};

// A fragment of 16 x 8n sums, whose corner is (row, column) of the tile, added to memory. The order of the additions to
// an element is that in which blocks come here.
template <int n>
PTX_INLINE void add_patches(float* tile, const float (&x)[4 * n], int row, int column, int head_dim) {
  float* const to = tile + Patches::patch(row, column, head_dim) + threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < 4 * n; ++i) ptx::red_add(to + 32 * i, x[i]);
}

// dq_sum and the turns of all heads become zero.
void clear_sums(const Backward&);  // in delta.cu

namespace {

constexpr int convert_threads = 256;

// dq = scale * sum. A thread writes 16 bytes; those of a warp are 8 rows of neighbouring sums.
template <class Layout, class T>
__global__ void __launch_bounds__(convert_threads)
    convert(const float* sums, int64_t rows_of_head, Rows<T> dq, Sizes sizes, int head_dim, float scale) {
  const int b = blockIdx.z, head = blockIdx.y, first = blockIdx.x * sum_tile;
  const Sequence s = sizes.sequence(b);
  if (first >= s.queries) return;
  const float* const tile = sums + (head * rows_of_head + first_sum_row(sizes, s, b) + first) * head_dim;
  for (int i = threadIdx.x; i < sum_tile * head_dim / 8; i += convert_threads) {
    const int row = i / (head_dim / 8 * 8) * 8 + i % 8, column = i / 8 % (head_dim / 8) * 8;
    if (first + row >= s.queries) continue;
    float x[8];
    Layout::read(tile, row, column, head_dim, x);
#pragma unroll
    for (int j = 0; j < 8; ++j) x[j] *= scale;
    ptx::store_v4(dq.at(b, s.first_query + first + row, head) + column,
                  make_uint4(pack<T>(x[0], x[1]), pack<T>(x[2], x[3]), pack<T>(x[4], x[5]), pack<T>(x[6], x[7])));
  }
}

template <class Layout, class T>
void write_dq(const Backward& x) {
  const Problem& p = x.forward;
  simt::Launch shape{grid_of(divide_up(p.queries, sum_tile), p.heads, p.batch), dim3(convert_threads)};
  shape.stream = p.stream;
  simt::launch(convert<Layout, T>, shape, static_cast<const float*>(x.dq_sum), sum_rows(p.total_queries, p.batch),
               Rows<T>::of(x.dq), Sizes::of(p), p.head_dim, p.scale);
}

}  // namespace
}  // namespace attention::backward
