// Step 02: one kernel. A block keeps a tile of queries and walks along the keys, a tile at a time, with the largest
// score and the sum of each row so far; what it has of o shrinks whenever a larger score comes. No score leaves it.
//
// 16 x 16 threads: a thread has 4 rows (2 where heads are wide), 2 keys of a tile and K / 16 columns of o, in pairs.
// The 16 that share a row lie in one half of a warp. K and V are read once for 64 queries (32 where heads are wide).
// Limit: the FMA units. A Hopper's tensor cores do 16 times as much a clock in bf16. And everybody waits for each tile
// to come: K and V pass through the same place, with four barriers a tile.
// Refuses: head widths other than 64, 96, 128, 192, 256.
#include "attention/forward/blocks.cuh"

namespace attention::forward {
namespace {

constexpr int across = 16, threads = across * across, tile_keys = 2 * across;

template <int head_dim>
struct Tile {
  static constexpr int rows = head_dim <= 128 ? 4 : 2;  // of a thread
  static constexpr int queries = across * rows;
};

// Rows are padded, by 16 bytes where threads read 16 bytes of neighbouring rows: eight rows then lie in other banks.
// The two halves of a warp write `rows` rows of p apart: the padding puts them 16 banks apart.
template <int head_dim>
struct alignas(16) Shared {
  float q[Tile<head_dim>::queries][head_dim + 4];
  float kv[tile_keys][head_dim + 4];
  float p[Tile<head_dim>::queries][tile_keys + across / Tile<head_dim>::rows];
};

// `rows` rows from global to shared memory, as floats; zeros past the last one: NaN may lie there, and 0 times that is
// no 0.
template <int rows, int padded, class T>
__device__ __forceinline__ void load_rows(float (&to)[rows][padded], const T* first_row, int64_t stride,
                                          int rows_left) {
  const int down = threadIdx.x / across, along = threadIdx.x % across * 4;
#pragma unroll
  for (int row = down; row < down + rows; row += across)
#pragma unroll
    for (int column = along; column < padded - 4; column += 4 * across) {
      uint2 four = make_uint2(0, 0);
      if (row < rows_left) four = *reinterpret_cast<const uint2*>(first_row + row * stride + column);
      const T(&x)[4] = reinterpret_cast<const T(&)[4]>(four);
      *reinterpret_cast<float4*>(&to[row][column]) = make_float4(x[0], x[1], x[2], x[3]);
    }
}

__device__ __forceinline__ float row_max(float x) {
  for (int apart = across / 2; apart > 0; apart /= 2) x = max(x, __shfl_xor_sync(0xffffffff, x, apart));
  return x;
}
__device__ __forceinline__ float row_sum(float x) {
  for (int apart = across / 2; apart > 0; apart /= 2) x += __shfl_xor_sync(0xffffffff, x, apart);
  return x;
}

// x[i][j] = q of row `row + i` . k of key `lane + 16 j` of the tile.
template <int head_dim, int rows>
__device__ __forceinline__ void multiply_keys(float (&x)[rows][2], const Shared<head_dim>& shared, int row, int lane) {
#pragma unroll 1  // more would spill: with 128 registers a thread two blocks fit
  for (int d = 0; d < head_dim; d += 4) {
    float4 k[2];
#pragma unroll
    for (int j = 0; j < 2; ++j) k[j] = *reinterpret_cast<const float4*>(&shared.kv[lane + across * j][d]);
#pragma unroll
    for (int i = 0; i < rows; ++i) {
      const float4 q = *reinterpret_cast<const float4*>(&shared.q[row + i][d]);
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        x[i][j] += q.x * k[j].x;
        x[i][j] += q.y * k[j].y;
        x[i][j] += q.z * k[j].z;
        x[i][j] += q.w * k[j].w;
      }
    }
  }
}

// o[i][c] += p of row `row + i` times columns 2 lane + 32 c and the next of v.
template <int head_dim, int rows>
__device__ __forceinline__ void multiply_values(float2 (&o)[rows][head_dim / 32], const Shared<head_dim>& shared,
                                                int row, int lane) {
#pragma unroll 4
  for (int key = 0; key < tile_keys; ++key) {
    float p[rows];
#pragma unroll
    for (int i = 0; i < rows; ++i) p[i] = shared.p[row + i][key];
#pragma unroll
    for (int c = 0; c < head_dim / 32; ++c) {
      const float2 v = *reinterpret_cast<const float2*>(&shared.kv[key][2 * lane + 2 * across * c]);
#pragma unroll
      for (int i = 0; i < rows; ++i) {
        o[i][c].x += p[i] * v.x;
        o[i][c].y += p[i] * v.y;
      }
    }
  }
}

template <int head_dim, class T>
__global__ void __launch_bounds__(threads, 2)
    online(Rows<T> q, Rows<T> k, Rows<T> v, Rows<T> o, float* lse, int64_t lse_batch, int64_t lse_head, Sizes sizes,
           Rules rules) {
  constexpr int rows = Tile<head_dim>::rows, queries = Tile<head_dim>::queries;
  auto& shared = simt::dynamic_shared<Shared<head_dim>>();
  const Block block = block_of(sizes, queries);
  const int b = block.b, head = block.head, first_query = block.first_query;
  const Sequence s = sizes.sequence(b);
  if (first_query >= s.queries) return;
  const int row = int(threadIdx.x) / across * rows, lane = threadIdx.x % across;
  const float scale_log2 = rules.scale * log2_e;

  load_rows(shared.q, q.at(b, s.first_query + first_query, head), q.row, s.queries - first_query);
  float2 sums[rows][head_dim / 32] = {};
  float most[rows], sum[rows] = {};
#pragma unroll
  for (int i = 0; i < rows; ++i) most[i] = -INFINITY;

  const Range range = rules.keys_of(s, first_query, first_query + queries);
#pragma unroll 1
  for (int key = range.first; key < range.last; key += tile_keys) {
    load_rows(shared.kv, k.at(b, s.first_key + key, sizes.kv_head(head)), k.row, s.keys - key);
    __syncthreads();
    float x[rows][2] = {};
    multiply_keys(x, shared, row, lane);
    __syncthreads();  // all have read K
    load_rows(shared.kv, v.at(b, s.first_key + key, sizes.kv_head(head)), v.row, s.keys - key);

    if (!rules.plain(s, first_query, queries, key, tile_keys))
#pragma unroll
      for (int i = 0; i < rows; ++i)
#pragma unroll
        for (int j = 0; j < 2; ++j)
          x[i][j] = rules.score(s, b, head, first_query + row + i, key + lane + across * j, x[i][j]);
#pragma unroll
    for (int i = 0; i < rows; ++i) {
      const float top = row_max(max(most[i], max(x[i][0], x[i][1])));
      const float shift = top == -INFINITY ? 0.f : top * scale_log2;  // nothing seen yet: exp(-inf - 0) = 0
      const float factor = ptx::exp2_approx(most[i] * scale_log2 - shift);
      most[i] = top;
      sum[i] *= factor;  // this lane's part of it
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const float e = ptx::exp2_approx(x[i][j] * scale_log2 - shift);
        sum[i] += e;
        shared.p[row + i][lane + across * j] = e;
      }
#pragma unroll
      for (int c = 0; c < head_dim / 32; ++c) sums[i][c] = make_float2(sums[i][c].x * factor, sums[i][c].y * factor);
    }
    __syncthreads();
    multiply_values(sums, shared, row, lane);
    __syncthreads();  // all have read V
  }

  const float sink = rules.sink ? rules.sink[head] * log2_e : -INFINITY;
#pragma unroll
  for (int i = 0; i < rows; ++i) {
    const int query = first_query + row + i;
    const float seen = most[i] * scale_log2, top = max(seen, sink);
    const float shift = top == -INFINITY ? 0.f : top;
    const float shrunk = ptx::exp2_approx(seen - shift);
    const float all = row_sum(sum[i]) * shrunk + ptx::exp2_approx(sink - shift);
    const float factor = all == 0.f ? 0.f : shrunk / all;
    if (query >= s.queries) continue;
    T* const to = o.at(b, s.first_query + query, head) + 2 * lane;
#pragma unroll
    for (int c = 0; c < head_dim / 32; ++c)
      *reinterpret_cast<uint32_t*>(to + 2 * across * c) = pack<T>(sums[i][c].x * factor, sums[i][c].y * factor);
    if (lane == 0) lse[b * lse_batch + head * lse_head + s.first_query + query] = (shift + log2f(all)) * ln_2;
  }
}

}  // namespace

void online_02(const Problem& p) {
  for_head_dim(p, "online_02", [&](auto width) {
    for_type(p, [&](auto element) {
      using T = decltype(element);
      constexpr int head_dim = width;
      simt::launch(online<head_dim, T>, grid_of_tiles(p, Tile<head_dim>::queries, threads, sizeof(Shared<head_dim>)),
                   Rows<T>::of(p.q), Rows<T>::of(p.k), Rows<T>::of(p.v), Rows<T>::of(p.o), p.lse, p.lse_batch,
                   p.lse_head, Sizes::of(p), Rules::of(p));
    });
  });
}

}  // namespace attention::forward
