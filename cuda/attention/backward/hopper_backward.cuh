// What the Hopper steps of the backward pass share. A block owns a tile of keys of one key/value head and walks over
// the tiles of queries that see it, for each query head of the group: dK and dV stay in registers, K and V in shared
// memory, and Q and dO pass by. With s = q k' and dp = do v',
//
//   p = exp(scale s - lse)   dv += p' do   ds = p (dp - delta)   dk += scale ds' q   dq += scale ds k
//
// Scores are computed turned round, rows = keys: as they come, p' and ds' are what the products for dV and dK take from
// registers. ds has to pass through shared memory for dQ, which many blocks add to: it is summed in float32.
//
// dq_sum: the tiles of a head, one sequence after the other; in a tile, pieces of 64 queries x 64 columns; in a piece,
// register i of thread t of the warpgroup that summed it is at 128 i + t. So a warp moves 128 bytes in a row, and a
// tile is one run of memory.
#pragma once
#include <algorithm>

#include "attention/hopper.cuh"

namespace attention::backward {

using hopper::boxes_of, hopper::tile_elements, hopper::tile_bytes, hopper::warpgroup, hopper::Cursor;

constexpr int piece = 64 * 64;  // elements

// What a kernel is told beside its tensors.
struct Given {
  Sizes sizes;
  Rules rules;
  const float *lse, *delta;
  int64_t lse_batch, lse_head;
  float* dq_sum;
  uint32_t* turns;  // how many pieces have been added to a tile of dq; null where the order does not matter
  int total_queries;
  static Given of(const Backward& b) {
    const Problem& p = b.forward;
    return {Sizes::of(p), Rules::of(p), p.lse, b.delta, p.lse_batch, p.lse_head, b.dq_sum,
            b.deterministic ? reinterpret_cast<uint32_t*>(b.turns) : nullptr, p.total_queries};
  }

  __device__ __forceinline__ int64_t row_of_lse(const Sequence& s, int b, int head) const {
    return b * lse_batch + head * lse_head + s.first_query;
  }
  // Tiles of all sequences, one after the other, in which each has room: of `rows` queries, for one head.
  __host__ __device__ __forceinline__ int tiles(int rows) const { return total_queries / rows + sizes.batch; }
  __device__ __forceinline__ int64_t tile(const Sequence& s, int b, int head, int index, int rows) const {
    const int start = sizes.starts_q ? s.first_query : b * sizes.queries;
    return int64_t(head) * tiles(rows) + start / rows + b + index;
  }
};

// A block's keys, and the (query head, tile of queries) pairs it walks over.
template <int keys, int queries>
struct Walk {
  Sequence s;
  int b, kv_head, first_key, first_tile, last_tile, steps;
  int head, tile;

  PTX_INLINE static Walk of_block(const Given& given) {
    Walk w;
    const int tiles = divide_up(given.sizes.keys, keys), above = blockIdx.x / tiles;
    w.first_key = blockIdx.x % tiles * keys;
    w.kv_head = above % given.sizes.kv_heads;
    w.b = above / given.sizes.kv_heads;
    w.s = given.sizes.sequence(w.b);
    const Range seen = given.rules.queries_of(w.s, w.first_key, w.first_key + keys);
    const int group = given.sizes.heads / given.sizes.kv_heads;
    w.first_tile = seen.first / queries;
    w.last_tile = seen.last > seen.first ? divide_up(seen.last, queries) : w.first_tile;
    w.steps = (w.last_tile - w.first_tile) * group;
    w.head = w.kv_head * group;
    w.tile = w.first_tile;
    return w;
  }
  PTX_INLINE void advance() {
    if (++tile == last_tile) {
      tile = first_tile;
      ++head;
    }
  }
  PTX_INLINE int first_query() const { return tile * queries; }
  // Coordinates of TMA: packed sequences are rows of one batch.
  PTX_INLINE int batch(const Given& given) const { return given.sizes.starts_q ? 0 : b; }
  PTX_INLINE int query_row() const { return s.first_query + first_query(); }
  PTX_INLINE int key_row() const { return s.first_key + first_key; }
  PTX_INLINE float* dq_tile(const Given& given, int head_dim) const {
    return given.dq_sum + given.tile(s, b, head, tile, queries) * queries * head_dim;
  }
  // Deterministic: the blocks that add to a tile do so in the order of their keys, `parts` pieces each. One thread
  // waits for its block's turn. Blocks start in the order of their index: those it waits for are there.
  PTX_INLINE uint32_t* turn(const Given& given) const { return given.turns + given.tile(s, b, head, tile, queries); }
  PTX_INLINE void wait_for_turn(const Given& given, int parts) const {
    const Range seen = given.rules.keys_of(s, first_query(), first_query() + queries);
    const int before = first_key / keys - seen.first / keys;
    while (ptx::load_acquire(turn(given)) < uint32_t(before * parts)) __nanosleep(64);
  }
};

// lse, in units of log2, and delta of a query. Queries that see nothing or do not exist get an lse of +inf: their
// probabilities are 0.
PTX_INLINE float lse_of(const Given& given, const Sequence& s, int b, int head, int query) {
  const float lse = query < s.queries ? given.lse[given.row_of_lse(s, b, head) + query] : -INFINITY;
  return lse == -INFINITY ? INFINITY : lse * log2_e;
}
PTX_INLINE float delta_of(const Given& given, const Sequence& s, int b, int head, int query) {
  return query < s.queries ? given.delta[given.row_of_lse(s, b, head) + query] : 0.f;
}

// ---- fragments of 64 keys x n queries: register i of a lane is column 8 (i / 4) + 2 (lane % 4) + i % 2 ----
PTX_INLINE float2 of_columns(const float* row, int i) {
  return *reinterpret_cast<const float2*>(row + 8 * (i / 4) + threadIdx.x % 4 * 2);
}

// What scores become, 16 queries (8 registers of a lane) at a time. `key` and `query` are those of the tile's first row
// and column; lse and delta are those of its columns.
template <class T, int n>
struct Scores {
  const Given& given;
  const Sequence& s;
  int b, head, key, query;
  const float *lse, *delta;

  PTX_INLINE bool plain() const { return given.rules.plain(s, query, n, key, 64); }

  // Of the lane's x[0].
  PTX_INLINE int row() const { return key + threadIdx.x % warpgroup / 32 * 16 + threadIdx.x % 32 / 4; }
  PTX_INLINE int column() const { return query + threadIdx.x % 4 * 2; }
  PTX_INLINE const float* bias() const {
    const Rules& r = given.rules;
    return r.bias ? r.bias + b * r.bias_batch + head * r.bias_head + column() * r.bias_row + row() : nullptr;
  }

  // Products q . k of columns 16 j .. become probabilities times the slope of the cap, and `p` the probabilities as a
  // left operand. This is Rules::score, but that the address of the bias is computed once for all columns.
  template <bool is_plain>
  PTX_INLINE void probabilities(float (&x)[n / 2], uint32_t (&p)[4], const float* bias_of_lane, int j) const {
    const float scale_log2 = given.rules.scale * log2_e;
#pragma unroll
    for (int i = 8 * j; i < 8 * j + 8; i += 2) {
      const float2 shift = of_columns(lse, i);
      float slope[2] = {1.f, 1.f};
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        float score = x[i + c];
        bool hidden = false;
        if constexpr (!is_plain) {
          const int down = 8 * (i / 2 % 2), across = 8 * (i / 4) + c;
          const bool seen = given.rules.sees(s, column() + across, row() + down);
          slope[c] = given.rules.slope(score);
          if (given.rules.softcap != 0.f) score = given.rules.cap * ptx::tanh_approx(score * given.rules.uncap);
          if (bias_of_lane && seen && column() + across < s.queries)
            score += bias_of_lane[across * given.rules.bias_row + down] * given.rules.unscale;
          hidden = !seen || score == -INFINITY;
        }
        x[i + c] = hidden ? 0.f : ptx::exp2_approx(score * scale_log2 - (c ? shift.y : shift.x));
      }
      p[i / 2 % 4] = pack<T>(x[i], x[i + 1]);
      x[i] *= slope[0], x[i + 1] *= slope[1];
    }
  }
  // ds of the same columns as a left operand, of what `probabilities` left in x, and dp.
  PTX_INLINE void differentiate(const float (&x)[n / 2], const float (&dp)[n / 2], uint32_t (&ds)[4], int j) const {
#pragma unroll
    for (int i = 8 * j; i < 8 * j + 8; i += 2) {
      const float2 shift = of_columns(delta, i);
      ds[i / 2 % 4] = pack<T>(x[i] * (dp[i] - shift.x), x[i + 1] * (dp[i + 1] - shift.y));
    }
  }

  // All columns, `take(j, operand)` gets what comes out; `both` in one go, where dp is there as soon as x: p takes the
  // registers of x and dp as those end.
  template <class Take>
  PTX_INLINE void probabilities(float (&x)[n / 2], Take take) const {
    const auto each = [&](auto is_plain, const float* bias_of_lane) {
#pragma unroll
      for (int j = 0; j < n / 16; ++j) {
        uint32_t p[4];
        probabilities<decltype(is_plain)::value>(x, p, bias_of_lane, j);
        take(j, p);
      }
    };
    if (plain()) each(std::true_type(), nullptr);
    else each(std::false_type(), bias());
  }
  template <class Take>
  PTX_INLINE void differentiate(const float (&x)[n / 2], const float (&dp)[n / 2], Take take) const {
#pragma unroll
    for (int j = 0; j < n / 16; ++j) {
      uint32_t ds[4];
      differentiate(x, dp, ds, j);
      take(j, ds);
    }
  }
  template <class Take>
  PTX_INLINE void both(float (&x)[n / 2], const float (&dp)[n / 2], uint32_t (&p)[n / 16][4], Take take) const {
    const auto each = [&](auto is_plain, const float* bias_of_lane) {
#pragma unroll
      for (int j = 0; j < n / 16; ++j) {
        uint32_t ds[4];
        probabilities<decltype(is_plain)::value>(x, p[j], bias_of_lane, j);
        differentiate(x, dp, ds, j);
        take(j, ds);
      }
    };
    if (plain()) each(std::true_type(), nullptr);
    else each(std::false_type(), bias());
  }
};

// A warpgroup's 64 rows x 16 columns of an operand to a tile of `rows` rows in boxes of 64 columns, as TMA would have
// written it: from row `first` and column 16 j on. wgmma may read it after a fence of the proxy and a barrier.
template <int rows, class T>
PTX_INLINE void store_operand(T* tile, const uint32_t (&x)[4], int first, int j) {
  const int thread = threadIdx.x % warpgroup, lane = thread % 32, row = 16 * (thread / 32) + lane % 16;
  const int place = (row * 128 + (lane / 16 ^ row % 8) * 16) ^ j % 4 * 32;  // 16-byte pieces of a row change places
  ptx::stmatrix_x4(reinterpret_cast<char*>(tile + j / 4 * rows * 64 + first * 64) + place, x);
}

// d (64 x head_dim) += a b along n rows of tile `b`: a lies in shared memory, 64 rows of a tile of `rows` from `first`
// on.
template <int n, int rows, int head_dim, class T>
PTX_INLINE void multiply_along_rows(float (&d)[head_dim / 2], const T* a, int first, const T* b) {
  const uint64_t left = hopper::k_major<rows>(a, first), right = hopper::mn_major<n>(b);
#pragma unroll
  for (int i = 0; i < n / 16; ++i)
    ptx::wgmma<head_dim, T, false, true>(d, left + hopper::k_step<rows>(i), right + hopper::mn_step(i), true);
}
// d (64 queries x 64 columns of the head) = ds k over `keys` rows: both lie with the keys down. Issued alone.
template <class T, int keys>
PTX_INLINE void multiply_along_keys(float (&d)[piece / warpgroup], const T* ds, const T* k) {
  const uint64_t left = hopper::mn_major<keys>(ds), right = hopper::mn_major<keys>(k);
#pragma unroll
  for (int i = 0; i < keys / 16; ++i)
    ptx::wgmma<64, T, true, true>(d, left + hopper::mn_step(i), right + hopper::mn_step(i), i > 0);
}

// ---- before and after: dq_sum = 0, turns = 0; dq = scale dq_sum ----
template <class = void>
__global__ void zero(float4* dq_sum, int64_t count, uint32_t* turns, int64_t count_turns) {
  const int64_t first = int64_t(blockIdx.x) * blockDim.x + threadIdx.x, stride = int64_t(gridDim.x) * blockDim.x;
#pragma unroll 1  // unrolled, it would divide to know how often
  for (int64_t i = first; i < count; i += stride) dq_sum[i] = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll 1
  for (int64_t i = first; i < count_turns; i += stride) turns[i] = 0;
}

// A block converts a tile, each warpgroup a piece of it.
template <class T, int head_dim, int queries>
__global__ void __launch_bounds__(queries / 64 * boxes_of(head_dim) * warpgroup)
    convert(const Given given, const Rows<T> dq) {
  constexpr int boxes = boxes_of(head_dim), last = head_dim - 64 * (boxes - 1);
  const int tiles = divide_up(given.sizes.queries, queries), above = blockIdx.x / tiles, index = blockIdx.x % tiles;
  const int head = above % given.sizes.heads, b = above / given.sizes.heads;
  const Sequence s = given.sizes.sequence(b);
  const int part = threadIdx.x / warpgroup, box = part % boxes, row = index * queries + part / boxes * 64;
  if (row >= s.queries) return;
  const float* const tile = given.dq_sum + given.tile(s, b, head, index, queries) * queries * head_dim;
  const float* const from = tile + part * piece + threadIdx.x % warpgroup;
  T* const to = dq.at(b, s.first_query + row, head) + box * 64;
  const auto move = [&](auto columns) {
    constexpr int n = decltype(columns)::value;
    float x[n / 2];
#pragma unroll
    for (int i = 0; i < n / 2; ++i) x[i] = given.rules.scale * from[i * warpgroup];
    hopper::store_rows<n>(x, to, dq.row, s.queries - row);
  };
  if (box + 1 < boxes) move(std::integral_constant<int, 64>());
  else move(std::integral_constant<int, last>());
}

// The whole pass of a kernel with Shape's T, head_dim, keys, queries, threads and Shared.
template <class Shape, class Kernel>
void run(const Backward& b, Kernel kernel) {
  using T = typename Shape::T;
  const Problem& p = b.forward;
  const Given given = Given::of(b);
  compute_delta(b);
  const int64_t tiles = int64_t(p.heads) * given.tiles(Shape::queries);
  const int64_t count = tiles * Shape::queries * Shape::head_dim / 4;
  const int64_t blocks = std::min<int64_t>((count + 255) / 256, 8 * simt::multiprocessors());
  simt::launch(zero<>, simt::Launch{dim3(unsigned(blocks)), dim3(256), 0, 1, false, p.stream},
               reinterpret_cast<float4*>(b.dq_sum), count, given.turns, given.turns ? tiles : int64_t(0));
  simt::launch(kernel,
               simt::Launch{dim3(divide_up(p.keys, Shape::keys) * p.kv_heads * p.batch), dim3(Shape::threads),
                            sizeof(typename Shape::Shared), 1, false, p.stream},
               hopper::query_map(p.q, p, Shape::queries), hopper::key_map(p.k, p, Shape::keys),
               hopper::key_map(p.v, p, Shape::keys), hopper::query_map(b.d_o, p, Shape::queries), given,
               Rows<T>::of(b.dk), Rows<T>::of(b.dv));
  simt::launch(convert<T, Shape::head_dim, Shape::queries>,
               simt::Launch{dim3(divide_up(p.queries, Shape::queries) * p.heads * p.batch),
                            dim3(Shape::queries / 64 * boxes_of(Shape::head_dim) * warpgroup), 0, 1, false, p.stream},
               given, Rows<T>::of(b.dq));
}

}  // namespace attention::backward
