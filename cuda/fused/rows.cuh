// What the fused operations share: how rows lie in memory, which threads have which part of a row, sums over a row.
//
// A *team* of threads has a row: 1 to 32 lanes of a warp where it is narrow, up to a whole block where it is wide. A
// row moves in *chunks* of n elements: 16 bytes, or a single element where an address or the width is no multiple of 16
// bytes. Neighbouring threads have neighbouring chunks, and a thread asks for all of its chunks before it uses the
// first. Everything is computed in float32. Nothing here depends on which thread comes first, so bits repeat.
#pragma once
#include <initializer_list>
#include <string>

#include "native/operation.h"
#include "simt/ptx.cuh"

namespace fused {

using native::View, simt::DataType;

template <class T>
constexpr int per_chunk = 16 / int(sizeof(T));

inline int64_t divide_up(int64_t x, int64_t y) { return (x + y - 1) / y; }

// ---- rows ----------------------------------------------------------------------------------------------------------
// Row r of an array of up to four dimensions, the last of which is the row: its place in the other three.
struct Place {
  int outer, middle, inner;
};
struct Sizes {
  int rows, middles, inners;  // rows = outers * middles * inners
  __device__ __forceinline__ Place place(int row) const {
    if (inners == rows) return {0, 0, row};  // one stride between rows: no division
    const unsigned above = unsigned(row) / unsigned(inners);
    return {int(above / unsigned(middles)), int(above % unsigned(middles)), int(unsigned(row) % unsigned(inners))};
  }
};
template <class T>
struct Rows {
  T* data;  // null: not given
  int64_t outer, middle, inner;
  __device__ __forceinline__ T* at(Place p) const {
    return data + p.outer * outer + p.middle * middle + p.inner * inner;
  }
};

// One row for all: gains, biases. float32 or, if not `wide`, the type of what it goes with.
struct Parameter {
  const void* data;
  bool wide;
};

// ---- chunks --------------------------------------------------------------------------------------------------------
// n elements as they lie in memory: 16 bytes or one element.
template <class T, int n>
using Bits = std::conditional_t<n == 1, T, uint4>;

PTX_INLINE float2 halves_of(uint32_t pair, __nv_bfloat16) {
  return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
}
PTX_INLINE float2 halves_of(uint32_t pair, __half) {
  __half half[2];
  memcpy(half, &pair, 4);
  return make_float2(float(half[0]), float(half[1]));
}
PTX_INLINE uint32_t pair_of(float low, float high, __nv_bfloat16) { return ptx::pack_bf16(low, high); }
PTX_INLINE uint32_t pair_of(float low, float high, __half) { return ptx::pack_f16(low, high); }

// The bits by value: through a reference into memory they would be four loads.
template <class T, int n>
PTX_INLINE void unpack(Bits<T, n> bits, float (&x)[n]) {
  if constexpr (n == 1) {
    x[0] = float(bits);
  } else {
    const uint32_t word[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (sizeof(T) == 4) {
        x[i] = __uint_as_float(word[i]);
      } else {
        const float2 two = halves_of(word[i], T());
        x[2 * i] = two.x, x[2 * i + 1] = two.y;
      }
    }
  }
}

template <class T, int n>
PTX_INLINE Bits<T, n> pack(const float (&x)[n]) {
  if constexpr (n == 1) {
    return T(x[0]);
  } else {
    uint32_t word[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (sizeof(T) == 4) word[i] = __float_as_uint(x[i]);
      else word[i] = pair_of(x[2 * i], x[2 * i + 1], T());
    }
    return make_uint4(word[0], word[1], word[2], word[3]);
  }
}

// The part of a row that one thread of a team has: chunks rank, rank + team, .. Beyond the row it reads zeros and
// writes nothing. A chunk lies inside or outside, never across the end.
template <class T, int n>
struct Span {
  int width, team, rank;

  __device__ __forceinline__ int column(int c) const { return (c * team + rank) * n; }
  __device__ __forceinline__ bool inside(int c) const { return column(c) < width; }

  template <int chunks>
  __device__ __forceinline__ void load(const T* row, Bits<T, n> (&x)[chunks]) const {
#pragma unroll
    for (int c = 0; c < chunks; ++c) {
      x[c] = Bits<T, n>();
      if (inside(c)) x[c] = *reinterpret_cast<const Bits<T, n>*>(row + column(c));
    }
  }
  __device__ __forceinline__ void store(T* row, int c, const float (&x)[n]) const {
    if (inside(c)) *reinterpret_cast<Bits<T, n>*>(row + column(c)) = pack<T, n>(x);
  }

  // x = chunk c of a row that may be float32 beside rows of T. It must be inside.
  __device__ __forceinline__ void load(Parameter p, int c, float (&x)[n]) const {
    if constexpr (sizeof(T) == 2) {
      if (p.wide) {
        const float* const from = static_cast<const float*>(p.data) + column(c);
        constexpr int m = n < 4 ? n : 4;
#pragma unroll
        for (int i = 0; i < n; i += m) {
          float part[m];
          unpack<float, m>(*reinterpret_cast<const Bits<float, m>*>(from + i), part);
#pragma unroll
          for (int j = 0; j < m; ++j) x[i + j] = part[j];
        }
        return;
      }
    }
    unpack<T, n>(*reinterpret_cast<const Bits<T, n>*>(static_cast<const T*>(p.data) + column(c)), x);
  }
};

// ---- teams ---------------------------------------------------------------------------------------------------------
// `size` is a power of two up to 32, or a multiple of 32. All threads of the block call sum and most, at one place.
struct Team {
  int size, index, rank, count;

  __device__ __forceinline__ explicit Team(int size)
      : size(size), index(int(threadIdx.x) / size), rank(int(threadIdx.x) % size), count(int(blockDim.x) / size) {}

  // Over the team, in each of its threads. `slots` is shared memory, one float a warp. What follows may use the same
  // slots again only if a barrier lies between: users alternate between two.
  __device__ __forceinline__ float sum(float x, float* slots) const {
    return reduce(x, slots, [](float a, float b) { return a + b; });
  }
  __device__ __forceinline__ float most(float x, float* slots) const {
    return reduce(x, slots, [](float a, float b) { return max(a, b); });
  }

 private:
  template <class Combine>
  __device__ __forceinline__ float reduce(float x, float* slots, Combine combine) const {
#pragma unroll
    for (int step = 16; step > 0; step /= 2)
      if (step < size) x = combine(x, __shfl_xor_sync(0xffffffff, x, step));
    if (size <= 32) return x;
    const int warps = size / 32;
    if (threadIdx.x % 32 == 0) slots[threadIdx.x / 32] = x;
    __syncthreads();
    float all = slots[index * warps];
#pragma unroll 4
    for (int i = 1; i < warps; ++i) all = combine(all, slots[index * warps + i]);
    return all;
  }
};
constexpr int most_warps = 24;

// ---- host: what a launch looks like ---------------------------------------------------------------------------------
// What a thread has of a row at most, and how many threads a team: what registers allow. Elements that come one by one
// have an address each.
template <int n>
constexpr int most_chunks = n == 1 ? 16 : 4;
template <int n>
constexpr int largest_team = n == 1 ? 320 : n == 4 ? 768 : 512;
template <int n>
constexpr int widest_row = largest_team<n> * n * most_chunks<n>;
// The largest block of a kernel whose threads have `chunks`: only rows too wide for a warp take more than 256 threads.
template <int n, int chunks>
constexpr int most_threads = chunks == most_chunks<n> ? largest_team<n> : 256;

// How rows are cut.
struct Plan {
  int team, teams, chunks;
  int threads() const { return team * teams; }
};

// Narrow rows stay within a warp; a wider row gets as many threads as it takes, each with as many chunks as it can
// hold. A block has about `threads`, or one team.
template <int n>
Plan plan_of(int64_t width, int threads) {
  constexpr int most = most_chunks<n>;
  const int chunks_of_row = int(divide_up(width, n));
  Plan plan = {1, 1, 1};
  while (plan.team < 32 && plan.team < chunks_of_row) plan.team *= 2;
  while (plan.chunks < most && plan.chunks * plan.team < chunks_of_row) plan.chunks *= 2;
  if (plan.chunks * plan.team < chunks_of_row) plan.team = int(divide_up(chunks_of_row, most * 32)) * 32;
  if (n == 1) plan.chunks = plan.chunks <= 4 ? 4 : most;  // fewer kernels
  plan.teams = plan.team < threads ? threads / plan.team : 1;
  return plan;
}

// Calls body(T()) with the element type.
template <class Body>
void with_type(DataType type, Body body) {
  if (type == DataType::f32) body(float());
  else if (type == DataType::bf16) body(__nv_bfloat16());
  else body(__half());
}
template <int value>
using Constant = std::integral_constant<int, value>;

// Calls body(T(), Constant<n>()) with the element type and the elements of a chunk.
template <class Body>
void with_chunk(DataType type, bool aligned, Body body) {
  with_type(type, [&](auto element) {
    if (aligned) body(element, Constant<per_chunk<decltype(element)>>());
    else body(element, Constant<1>());
  });
}
// Calls body(Constant<chunks>()) for a plan's chunks.
template <int n, class Body>
void with_count(int chunks, Body body) {
  if constexpr (n == 1) {
    if (chunks == 4) body(Constant<4>());
    else body(Constant<most_chunks<n>>());
  } else {
    if (chunks == 1) body(Constant<1>());
    else if (chunks == 2) body(Constant<2>());
    else body(Constant<4>());
  }
}

// ---- host: arrays as rows -------------------------------------------------------------------------------------------
inline int64_t width_of(const View& x) { return x.size[x.rank - 1]; }

// The rows of x, a float array of 1 to 4 dimensions. Raises for what kernels cannot index.
inline Sizes sizes_of(const View& x) {
  if (x.rank < 1) x.refuse("is a scalar: expected at least one dimension");
  x.expect_type({DataType::f32, DataType::bf16, DataType::f16});
  int64_t rows = 1;
  for (int i = 0; i + 1 < x.rank; ++i) rows *= x.size[i];
  if (rows > 2147483647 - 65536) x.refuse("shape " + x.shape() + ": expected less than 2^31 rows");
  return {int(rows), x.rank > 2 ? int(x.size[x.rank - 3]) : 1, x.rank > 1 ? int(x.size[x.rank - 2]) : 1};
}

// `x` as rows of `width` elements at the places of `like`.
template <class T>
Rows<T> rows_of(const View& x, const View& like, int64_t width) {
  bool same = x.rank == like.rank && width_of(x) == width;
  for (int i = 0; same && i + 1 < x.rank; ++i) same = x.size[i] == like.size[i];
  if (!same)
    x.refuse("shape " + x.shape() + ": expected rows of " + std::to_string(width) + " as in " + like.name + " " +
             like.shape());
  if (width > 1 && x.stride[x.rank - 1] != 1)
    x.refuse("strides " + x.strides() + ": expected a contiguous last dimension; call .contiguous()");
  if constexpr (!std::is_const_v<T>) x.expect_writable();
  const auto stride = [&](int from_last) { return x.rank > from_last ? x.stride[x.rank - 1 - from_last] : 0; };
  return {x.as<T>(), stride(3), stride(2), stride(1)};
}
template <class T>
Rows<T> rows_of(const View* x, const View& like, int64_t width) {
  return x ? rows_of<T>(x->expect_type({like.type}), like, width) : Rows<T>{nullptr, 0, 0, 0};
}

// A gain or a bias: (width,), in float32 or the type of x. Null: none.
inline Parameter parameter_of(const View* p, const View& x) {
  if (!p) return {nullptr, false};
  p->expect_type({x.type, DataType::f32}).expect_shape({width_of(x)}).expect_contiguous();
  return {p->data, p->type == DataType::f32};
}

// Every row can be cut into 16 bytes that start at a multiple of 16 bytes. Null stands for what is not given.
inline bool aligned(int64_t width, std::initializer_list<const View*> arrays) {
  for (const View* x : arrays) {
    if (!x) continue;
    const int size = simt::size_of(x->type);
    if (width * size % 16 || reinterpret_cast<uintptr_t>(x->data) % 16) return false;
    for (int i = 0; i + 1 < x->rank; ++i)
      if (x->size[i] > 1 && x->stride[i] * size % 16) return false;
  }
  return true;
}

inline simt::Launch launch_of(int64_t blocks, int threads, void* stream, size_t shared_bytes = 0) {
  simt::Launch launch{dim3(unsigned(blocks)), dim3(unsigned(threads)), shared_bytes};
  launch.stream = stream;
  return launch;
}

}  // namespace fused
