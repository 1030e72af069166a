// Step 01: the backward pass by definition, on CUDA cores. Nothing of size T x S is in memory: each score is computed
// anew from q and k, and p = exp(s - lse) with the lse that the forward pass left. dk and dv are sums over queries, and
// dq is one over keys: two kernels. A block owns the rows that it sums up, and no two add to the same place; so this is
// deterministic, with nothing done for it. Under GQA a key's sums run over the queries of all heads of its group.
//
// Limit: p and ds are computed twice, and every product is float32 FMAs fed from shared memory. Takes all of Backward.
// Refuses: head widths above 256 or not a multiple of 8.
#include "attention/backward/common.cuh"

namespace attention::backward {
namespace {

constexpr int tile = 16, threads = tile * tile, widest = 256, columns = widest / tile;

using Tile = float[tile][widest + 1];  // one more: 16 rows at the same column then lie in different banks
struct alignas(128) Shared {
  Tile q, d_o, k, v;
  float p[tile][tile], ds[tile][tile];  // of a query and a key
};

// Rows first .. first + 15 of a sequence that has `count` of them and starts at `start`; zeros past its end. Thread
// 16 r + c has columns c, c + 16, .. of row r, here and in the sums.
template <class T>
PTX_INLINE void load(Tile& to, const Rows<const T>& from, int b, int head, int start, int first, int count,
                     int head_dim) {
  const int row = threadIdx.x / tile;
  const bool exists = first + row < count;
  for (int column = threadIdx.x % tile; column < head_dim; column += tile)
    to[row][column] = exists ? float(from.at(b, start + first + row, head)[column]) : 0.f;
}

// p and ds of the thread's own pair: query r and key c of the tiles. Zero where it is not seen.
template <class T>
PTX_INLINE void compute_pair(Shared& shared, const Inputs<T>& in, const Sequence& s, int b, int head, int first_query,
                             int first_key, int head_dim) {
  const int r = threadIdx.x / tile, c = threadIdx.x % tile, query = first_query + r;
  float product = 0.f, dp = 0.f;
  for (int i = 0; i < head_dim; ++i) {
    product += shared.q[r][i] * shared.k[c][i];
    dp += shared.d_o[r][i] * shared.v[c][i];
  }
  float p = 0.f, ds = 0.f;
  const float score = in.rules.score(s, b, head, query, first_key + c, product);
  if (query < s.queries && score != -INFINITY) {
    const int64_t at = in.statistic(b, s.first_query + query, head);
    p = ptx::exp2_approx(score * (in.rules.scale * log2_e) - in.lse[at] * log2_e);
    ds = p * (dp - in.delta[at]) * in.rules.slope(product) * in.rules.scale;
  }
  shared.p[r][c] = p;
  shared.ds[r][c] = ds;
}

template <class T>
__global__ void __launch_bounds__(threads) keys(Inputs<T> in, Rows<T> dk, Rows<T> dv, int head_dim) {
  Shared& shared = simt::dynamic_shared<Shared>();
  const int b = blockIdx.z, kv_head = blockIdx.y, first = blockIdx.x * tile, group = in.sizes.heads / in.sizes.kv_heads;
  const int row = threadIdx.x / tile, column = threadIdx.x % tile;
  const Sequence s = in.sizes.sequence(b);
  if (first >= s.keys) return;
  load(shared.k, in.k, b, kv_head, s.first_key, first, s.keys, head_dim);
  load(shared.v, in.v, b, kv_head, s.first_key, first, s.keys, head_dim);

  float dk_sum[columns] = {}, dv_sum[columns] = {};
  const Range queries = in.rules.queries_of(s, first, first + tile);
  for (int head = kv_head * group; head < (kv_head + 1) * group; ++head) {
    for (int query = queries.first; query < queries.last; query += tile) {
      __syncthreads();  // the tiles before these have been used
      load(shared.q, in.q, b, head, s.first_query, query, s.queries, head_dim);
      load(shared.d_o, in.d_o, b, head, s.first_query, query, s.queries, head_dim);
      __syncthreads();
      compute_pair(shared, in, s, b, head, query, first, head_dim);
      __syncthreads();
#pragma unroll
      for (int i = 0; i < columns; ++i) {
        if (column + tile * i >= head_dim) break;
        for (int j = 0; j < tile; ++j) {
          dk_sum[i] += shared.ds[j][row] * shared.q[j][column + tile * i];
          dv_sum[i] += shared.p[j][row] * shared.d_o[j][column + tile * i];
        }
      }
    }
  }
  if (first + row >= s.keys) return;
#pragma unroll
  for (int i = 0; i < columns; ++i) {
    if (column + tile * i >= head_dim) break;
    dk.at(b, s.first_key + first + row, kv_head)[column + tile * i] = T(dk_sum[i]);
    dv.at(b, s.first_key + first + row, kv_head)[column + tile * i] = T(dv_sum[i]);
  }
}

template <class T>
__global__ void __launch_bounds__(threads) queries(Inputs<T> in, Rows<T> dq, int head_dim) {
  Shared& shared = simt::dynamic_shared<Shared>();
  const int b = blockIdx.z, head = blockIdx.y, first = blockIdx.x * tile, kv_head = in.sizes.kv_head(head);
  const int row = threadIdx.x / tile, column = threadIdx.x % tile;
  const Sequence s = in.sizes.sequence(b);
  if (first >= s.queries) return;
  load(shared.q, in.q, b, head, s.first_query, first, s.queries, head_dim);
  load(shared.d_o, in.d_o, b, head, s.first_query, first, s.queries, head_dim);

  float dq_sum[columns] = {};
  const Range keys = in.rules.keys_of(s, first, first + tile);
  for (int key = keys.first; key < keys.last; key += tile) {
    __syncthreads();
    load(shared.k, in.k, b, kv_head, s.first_key, key, s.keys, head_dim);
    load(shared.v, in.v, b, kv_head, s.first_key, key, s.keys, head_dim);
    __syncthreads();
    compute_pair(shared, in, s, b, head, first, key, head_dim);
    __syncthreads();
#pragma unroll
    for (int i = 0; i < columns; ++i) {
      if (column + tile * i >= head_dim) break;
      for (int j = 0; j < tile; ++j) dq_sum[i] += shared.ds[row][j] * shared.k[j][column + tile * i];
    }
  }
  if (first + row >= s.queries) return;
#pragma unroll
  for (int i = 0; i < columns; ++i) {
    if (column + tile * i >= head_dim) break;
    dq.at(b, s.first_query + first + row, head)[column + tile * i] = T(dq_sum[i]);
  }
}

}  // namespace

void recompute_01(const Backward& x) {
  const Problem& p = x.forward;
  if (p.head_dim % 8 || p.head_dim > widest)
    refuse("head width " + std::to_string(p.head_dim) + ": expected a multiple of 8 up to 256 (recompute_01)");
  simt::Launch of_keys{grid_of(divide_up(p.keys, tile), p.kv_heads, p.batch), dim3(threads), sizeof(Shared)};
  simt::Launch of_queries{grid_of(divide_up(p.queries, tile), p.heads, p.batch), dim3(threads), sizeof(Shared)};
  of_keys.stream = of_queries.stream = p.stream;
  compute_delta(x);
  for_type(p, [&](auto zero) {
    using T = decltype(zero);
    simt::launch(keys<T>, of_keys, Inputs<T>::of(x), Rows<T>::of(x.dk), Rows<T>::of(x.dv), p.head_dim);
    simt::launch(queries<T>, of_queries, Inputs<T>::of(x), Rows<T>::of(x.dq), p.head_dim);
  });
}

}  // namespace attention::backward
