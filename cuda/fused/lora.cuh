// Many LoRA adapters in one batch: y[i] (+)= scale * (x[i] A^T) B^T, with the A and B of row i's adapter. What the two
// ways to do it share: how the operands lie, what is known of an adapter, what is written between the two products.
//
// x, y and the pools may lie anywhere: a *chunk* is 16 bytes at once where elements lie side by side and every line
// starts at a multiple of 16 bytes (`wide`), and else is put together from single elements. What lies past an adapter's
// rank is neither read by elements nor does it count. Types: float32, bfloat16, float16; sums are float32.
// Refused: more than 256 ranks; values of indices, ranks and segments are looked at in cuda/lora_ops.py.
#pragma once
#include "fused/rows.cuh"

namespace fused {
namespace lora {

constexpr int most_ranks = 256;

// Rows and columns with a step in elements each.
template <class T>
struct Matrix {
  T* data;
  int64_t row, column;
  bool wide;
  __device__ __forceinline__ T* at(int64_t i, int64_t j) const { return data + i * row + j * column; }
};

// The A or the B of every adapter, both seen as (ranks, columns): columns are those of x for A, of y for B.
template <class T>
struct Pool {
  const T* data;
  int64_t adapter, rank, column;
  bool wide;
  __device__ __forceinline__ const T* at(int64_t i, int64_t r, int64_t j) const {
    return data + i * adapter + r * rank + j * column;
  }
};

struct Adapters {
  const int32_t *indices, *ranks;  // ranks may be null: all are `most`
  const float* scales;
  int most, count;  // ranks; adapters in the pool
  __device__ __forceinline__ int rank(int adapter) const {
    const int rank = ranks ? ranks[adapter] : most;
    return min(max(rank, 0), most);
  }
};

// x A^T: parts over the columns of x, each (rows, pitch).
struct Between {
  float* data;
  int rows, pitch, parts;
  __device__ __forceinline__ float* at(int part, int row, int rank) const {
    return data + (int64_t(part) * rows + row) * pitch + rank;
  }
};

// 16 bytes, or as many elements as are `left`, zeros after them.
template <bool wide, class T>
PTX_INLINE uint4 load_chunk(const T* from, int64_t step, int left) {
  constexpr int n = per_chunk<T>;
  if constexpr (wide) {
    return ptx::load_nc_v4_if(left > 0, from);
  } else {
    float x[n];
#pragma unroll
    for (int i = 0; i < n; ++i) x[i] = i < left ? float(from[i * step]) : 0.f;
    return pack<T, n>(x);
  }
}

// Writes 16 bytes of a row of y, or adds to them; not past the column `end`.
template <class T>
PTX_INLINE void store_run(const Matrix<T>& y, int row, int column, int end, const float* sum, float scale, bool add) {
  constexpr int n = per_chunk<T>;
  T* const to = y.at(row, column);
  if (y.wide) {
    float x[n] = {};
    if (add) unpack<T, n>(*reinterpret_cast<const uint4*>(to), x);
#pragma unroll
    for (int i = 0; i < n; ++i) x[i] += sum[i] * scale;
    *reinterpret_cast<uint4*>(to) = pack<T, n>(x);
  } else {
#pragma unroll 1
    for (int i = 0; i < n && column + i < end; ++i) {
      T* const one = to + i * y.column;
      *one = T((add ? float(*one) : 0.f) + sum[i] * scale);
    }
  }
}

// ---- host -----------------------------------------------------------------------------------------------------------
using native::Arguments;

// Whether all that lies beside each other in dimension `along` can be moved by 16 bytes; `whole`: and ends with 16.
inline bool in_chunks(const View& x, int along, bool whole) {
  const int size = simt::size_of(x.type);
  bool wide = reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && (x.stride[along] == 1 || x.size[along] == 1);
  for (int i = 0; i < x.rank; ++i)
    if (i != along && x.size[i] > 1) wide = wide && x.stride[i] * size % 16 == 0;
  return wide && !(whole && x.size[along] * size % 16);
}

inline int size_of(const View& x, int dimension) {
  const int64_t size = x.size[dimension];
  if (size < 1 || size > (1 << 30))
    x.refuse("shape " + x.shape() + ": expected 1 to 2^30 in dimension " + std::to_string(dimension));
  return int(size);
}

template <class T>
Matrix<T> matrix_of(const View& x, bool whole = true) {
  return {x.as<T>(), x.stride[0], x.stride[1], in_chunks(x, 1, whole)};
}

// Of a pool of shape (adapters, ranks, columns).
template <class T>
Pool<T> pool_of(const View& x, bool along_ranks, bool whole) {
  return {x.as<const T>(), x.stride[0], x.stride[1], x.stride[2], in_chunks(x, along_ranks ? 1 : 2, whole)};
}

// The same pool with its last two dimensions exchanged.
inline View turned(View x) {
  if (x.rank == 3) std::swap(x.size[1], x.size[2]), std::swap(x.stride[1], x.stride[2]);
  return x;
}

// x (rows, width) and the pools a and b (adapters, most, width and out), with what is known of them, shapes checked.
struct Given {
  View x, a, b, between;
  int rows, width, out, most;
  Adapters adapters;

  Given(const Arguments& given, int64_t count, const View& x, const View& a, const View& b, const char* workspace)
      : x(x), a(a), b(b), between(given.array(workspace)) {
    x.expect_rank(2).expect_type({DataType::f32, DataType::bf16, DataType::f16});
    a.expect_rank(3).expect_type({x.type});
    b.expect_rank(3).expect_type({x.type});
    between.expect_rank(3).expect_type({DataType::f32}).expect_contiguous().expect_aligned(16).expect_writable();
    rows = size_of(x, 0), width = size_of(x, 1), out = size_of(b, 2), most = size_of(a, 1);
    const int64_t pool = size_of(a, 0);
    if (most > most_ranks) a.refuse("a rank of " + std::to_string(most) + ": expected 1 to 256");
    a.expect_shape({pool, most, width});
    b.expect_shape({pool, most, out});
    between.expect_shape({size_of(between, 0), rows, divide_up(most, 8) * 8});
    if (between.size[0] > 65535) between.refuse("shape " + between.shape() + ": expected at most 65535 parts");
    const View& indices = given.array("indices").expect_type({DataType::i32}).expect_shape({count});
    const View& scales = given.array("scales").expect_type({DataType::f32}).expect_shape({pool});
    adapters = {indices.expect_contiguous().as<int32_t>(), nullptr, scales.expect_contiguous().as<float>(), most,
                int(pool)};
    if (const View* const ranks = given.optional("ranks"))
      adapters.ranks = ranks->expect_type({DataType::i32}).expect_shape({pool}).expect_contiguous().as<int32_t>();
  }
  Between parts() const { return {between.as<float>(), rows, int(between.size[2]), int(between.size[0])}; }
  // What goes with `out`: (rows, out).
  const View& check_like(const View& y) const { return y.expect_type({x.type}).expect_shape({rows, out}); }
  const View& check(const View& y) const { return check_like(y).expect_writable(); }
};

}  // namespace lora
}  // namespace fused
