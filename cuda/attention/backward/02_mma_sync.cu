// Step 02: FlashAttention-2's backward pass (Dao 2023) with mma.sync and cp.async, for any GPU from Ampere on. A block
// owns 64 keys and walks over the queries that see them. Step 01 computed scores twice, here they are computed once:
// five products a pair of tiles. dk and dv stay in registers. A part of dq is added to float32 sums in memory, which a
// small kernel converts at the end. p and ds go through shared memory, where ldmatrix transposes them as each product
// needs it; so every product is cut into shares for eight warps in the way that suits it.
//
// Parts of dq come in the order in which blocks run. `deterministic` lets them add in the order of the keys instead: a
// counter for each 64 queries says whose turn it is. A block waits for blocks of smaller number only, which have
// started. That costs waiting at the start, until each is a tile behind the one before, and two more barriers a tile.
//
// Limit: operands pass through registers, each warp's for itself. At head width 128 the eight warps read 384 KB for 64
// queries: 3072 clocks at 128 bytes a clock, in which Hopper's tensor cores could do more than twice the work.
// Refuses: head widths other than 64, 96, 128, 192, 256.
#include "attention/backward/common.cuh"

namespace attention::backward {
namespace {

constexpr int tile_keys = 64, warps = 8, threads = 32 * warps;

// 64 queries a tile, 32 where rows are so long that it takes the registers for dk and dv. While a tile is used the next
// Q comes; dO comes while S is computed, so that one place is enough for it.
template <int head_dim>
constexpr int tile_queries = head_dim <= 128 ? 64 : 32;

template <class T, int head_dim>
struct alignas(128) Shared {
  static constexpr int queries = tile_queries<head_dim>;
  T k[tile_keys * head_dim], v[tile_keys * head_dim];  // dk and dv at the end
  T q[2][queries * head_dim], d_o[queries * head_dim];
  T p[queries * tile_keys], ds[queries * tile_keys];
  float lse[2][queries], delta[queries];
};

// Where an element lies in a tile. The 16-byte chunks of a row are permuted, so that eight rows at the same column,
// which ldmatrix reads at once, lie in different banks. Rows of 96 elements start at two places of the 128 bytes that
// all banks make, all others at one.
template <int columns>
PTX_INLINE int place(int row, int column) {
  const int turn = columns % 64 == 0 ? row % 8 : row / 2 % 4;
  return row * columns + column / 64 * 64 + (column / 8 ^ turn) % 8 * 8 + column % 8;
}

// `rows` rows from `first` on of a sequence that starts at `start` and has `count`; past its end zeros.
template <int rows, int columns, class T>
PTX_INLINE void copy(T* to, const Rows<const T>& from, int b, int head, int start, int first, int count) {
#pragma unroll
  for (int done = 0; done < rows * columns / 8; done += threads) {
    const int i = done + threadIdx.x, row = i / (columns / 8), column = i % (columns / 8) * 8;
    const bool exists = first + row < count;
    ptx::cp_async(to + place<columns>(row, column), from.at(b, start + (exists ? first + row : 0), head) + column,
                  exists ? 16 : 0);
  }
}
// The same of lse or delta, by the first threads. A query past the end then has p = exp(0 - 0), and do = 0 makes it
// count for nothing.
template <int rows>
PTX_INLINE void copy_statistic(float* to, const float* from, int first, int count) {
  if (threadIdx.x >= rows) return;
  const int row = first + threadIdx.x;
  ptx::cp_async<4>(to + threadIdx.x, from + (row < count ? row : 0), row < count ? 4 : 0);
}

// ---- products: lines (rows of A, columns of B) times depth ----
// A tile as an operand. Its rows are lines, or steps of depth: then ldmatrix transposes.
template <class T, int columns, bool rows_are_lines>
struct Operand {
  const T* tile;

  // 16 lines x 16 of depth. Of four 8 x 8 matrices A's fragment counts along lines first, B's along depth first.
  template <bool is_a>
  PTX_INLINE void load(uint32_t (&fragment)[4], int line, int depth) const {
    const int matrix = threadIdx.x % 32 / 8, row = threadIdx.x % 8;
    line += 8 * (is_a ? matrix % 2 : matrix / 2) + (rows_are_lines ? row : 0);
    depth += 8 * (is_a ? matrix / 2 : matrix % 2) + (rows_are_lines ? 0 : row);
    const int at = rows_are_lines ? place<columns>(line, depth) : place<columns>(depth, line);
    ptx::ldmatrix_x4<!rows_are_lines>(fragment, tile + at);
  }
};

// This warp's share of a product: sum[i] is of rows `row` + 16 i .., its columns are `column` .. + 16 n - 1.
template <int depth, int m, int n, class T, int a_columns, bool a_lines, int b_columns, bool b_lines>
PTX_INLINE void multiply(float (&sum)[m][n], const Operand<T, a_columns, a_lines>& a, int row,
                         const Operand<T, b_columns, b_lines>& b, int column) {
#pragma unroll
  for (int k = 0; k < depth; k += 16) {
    uint32_t a_part[m][4];
#pragma unroll
    for (int i = 0; i < m; ++i) a.template load<true>(a_part[i], row + 16 * i, k);
#pragma unroll
    for (int j = 0; j < n / 8; ++j) {
      uint32_t b_part[4];
      b.template load<false>(b_part, column + 16 * j, k);
#pragma unroll
      for (int i = 0; i < m; ++i)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float(&x)[4] = reinterpret_cast<float(&)[4]>(sum[i][8 * j + 4 * half]);
          const uint32_t pair[2] = {b_part[2 * half], b_part[2 * half + 1]};
          ptx::mma_m16n8k16<T>(x, a_part[i], pair, x);
        }
    }
  }
}

// A fragment of 16 rows, rounded, into a tile.
template <int columns, int n, class T>
PTX_INLINE void put(T* tile, const float (&x)[n], int row, int column, float factor = 1.f) {
  row += threadIdx.x % 32 / 4;
  column += threadIdx.x % 4 * 2;
#pragma unroll
  for (int i = 0; i < n; i += 2)
    *reinterpret_cast<uint32_t*>(tile + place<columns>(row + i / 2 % 2 * 8, column + i / 4 * 8)) =
        pack<T>(factor * x[i], factor * x[i + 1]);
}

// Scores become p, which go to shared memory, and then what dp - delta is to be multiplied with: p slope.
template <int n, class T>
PTX_INLINE void exponentiate(float (&x)[n], T* p, const float* lse, const Rules& rules, const Sequence& s, int b,
                             int head, int query, int key, int row, int column) {
  const int lane = threadIdx.x % 32, own_row = row + lane / 4, own_column = column + lane % 4 * 2;
  float slope[n];
  const bool capped = rules.softcap != 0.f;
  if (capped) {
#pragma unroll
    for (int i = 0; i < n; ++i) slope[i] = rules.slope(x[i]);
  }
  if (!rules.plain(s, query + row, 16, key + column, 2 * n))
    edit<2 * n>(x, rules, s, b, head, query + own_row, key + own_column);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float own = lse[own_row + 8 * half], shift = own == -INFINITY ? 0.f : own * log2_e;  // -inf: all x are -inf
#pragma unroll
    for (int i = 2 * half; i < n; i += 4)
#pragma unroll
      for (int j = i; j < i + 2; ++j) x[j] = ptx::exp2_approx(x[j] * (rules.scale * log2_e) - shift);
  }
  put<tile_keys>(p, x, row, column);
  if (capped) {
#pragma unroll
    for (int i = 0; i < n; ++i) x[i] *= slope[i];
  }
}

// Sums of the block's keys to global memory by way of shared memory, so that whole rows are written.
template <int head_dim, int m, int n, class T>
PTX_INLINE void store(T* tile, const float (&sum)[m][n], int row, int column, float factor, const Rows<T>& to, int b,
                      int kv_head, const Sequence& s, int first) {
#pragma unroll
  for (int i = 0; i < m; ++i) put<head_dim>(tile, sum[i], row + 16 * i, column, factor);
  __syncthreads();
#pragma unroll 1
  for (int i = threadIdx.x; i < tile_keys * head_dim / 8; i += threads) {
    const int key = i / (head_dim / 8), at = i % (head_dim / 8) * 8;
    if (first + key < s.keys)
      ptx::store_v4(to.at(b, s.first_key + first + key, kv_head) + at,
                    *reinterpret_cast<const uint4*>(tile + place<head_dim>(key, at)));
  }
}

// What a block does, step by step: the queries that see its keys, for each head of its group, in whole tiles of 64.
template <int queries>
struct Walk {
  int first_head, first_query, tiles, steps;

  __device__ __forceinline__ Walk(const Sizes& sizes, const Rules& rules, const Sequence& s, int kv_head, int key) {
    const Range seen = rules.queries_of(s, key, key + tile_keys);
    const int group = sizes.heads / sizes.kv_heads;
    first_head = kv_head * group;
    first_query = seen.first / sum_tile * sum_tile;
    tiles = seen.last > seen.first ? divide_up(seen.last - first_query, sum_tile) * (sum_tile / queries) : 0;
    steps = tiles * group;
  }
  __device__ __forceinline__ int head(int step) const { return first_head + step / tiles; }
  __device__ __forceinline__ int query(int step) const { return first_query + step % tiles * queries; }
};

// Lets blocks add to dq of 64 queries in the order of their keys.
struct Turn {
  uint32_t *count, before;  // how many blocks have added, or null: in any order; and how many come before this one

  __device__ __forceinline__ Turn(uint32_t* count, const Rules& rules, const Sequence& s, int query, int key)
      : count(count), before(key / tile_keys - rules.keys_of(s, query, query + sum_tile).first / tile_keys) {}
  __device__ __forceinline__ void wait() const {
    if (!count) return;
    if (threadIdx.x == 0)
      while (ptx::load_acquire(count) != before) {
      }
    __syncthreads();
  }
  __device__ __forceinline__ void pass() const {
    if (!count) return;
    __syncthreads();
    if (threadIdx.x == 0) ptx::store_release(count, before + 1);
  }
};

// turns: null, or a counter for each 64 rows of dq_sum.
template <class T, int head_dim>
__global__ void __launch_bounds__(threads)
    mma_sync(Inputs<T> in, Rows<T> dk, Rows<T> dv, float* dq_sum, int64_t rows_of_head, uint32_t* turns) {
  // How warps share a product. Where its columns are the head's, m_keys or m_queries times 16 rows each; S and dP: 16.
  constexpr int queries = tile_queries<head_dim>, across = head_dim % 64 == 0 ? 4 : 2, columns = head_dim / across;
  constexpr int m_keys = tile_keys / 16 * across / warps, m_queries = queries / 16 * across / warps;
  constexpr int score_across = warps / (queries / 16), score_columns = tile_keys / score_across;
  auto& shared = simt::dynamic_shared<Shared<T, head_dim>>();
  const int b = blockIdx.z, kv_head = blockIdx.y, key = blockIdx.x * tile_keys, warp = threadIdx.x / 32;
  const Sequence s = in.sizes.sequence(b);
  if (key >= s.keys) return;

  const Walk<queries> walk(in.sizes, in.rules, s, kv_head, key);
  const auto copy_q = [&](int step) {
    const int head = walk.head(step), query = walk.query(step);
    copy<queries, head_dim>(shared.q[step % 2], in.q, b, head, s.first_query, query, s.queries);
    copy_statistic<queries>(shared.lse[step % 2], in.lse + in.statistic(b, s.first_query, head), query, s.queries);
  };
  copy<tile_keys, head_dim>(shared.k, in.k, b, kv_head, s.first_key, key, s.keys);
  copy<tile_keys, head_dim>(shared.v, in.v, b, kv_head, s.first_key, key, s.keys);
  if (walk.steps > 0) copy_q(0);
  ptx::cp_async_commit_group();

  const int row = warp / across * 16, column = warp % across * columns;  // the row: times m_keys or m_queries
  const int score_row = warp / score_across * 16, score_column = warp % score_across * score_columns;
  using RowsAsLines = Operand<T, head_dim, true>;
  using RowsAsDepth = Operand<T, head_dim, false>;
  float dk_sum[m_keys][columns / 2] = {}, dv_sum[m_keys][columns / 2] = {};

#pragma unroll 1
  for (int step = 0; step < walk.steps; ++step) {
    const int head = walk.head(step), query = walk.query(step);
    ptx::cp_async_wait_group<0>();
    __syncthreads();  // Q has come, and all are done with the tiles of the step before
    copy<queries, head_dim>(shared.d_o, in.d_o, b, head, s.first_query, query, s.queries);
    copy_statistic<queries>(shared.delta, in.delta + in.statistic(b, s.first_query, head), query, s.queries);
    ptx::cp_async_commit_group();
    if (step + 1 < walk.steps) copy_q(step + 1);
    ptx::cp_async_commit_group();

    const T* const q = shared.q[step % 2];
    float p[1][score_columns / 2] = {}, ds[1][score_columns / 2] = {};
    multiply<head_dim>(p, RowsAsLines{q}, score_row, RowsAsLines{shared.k}, score_column);
    exponentiate(p[0], shared.p, shared.lse[step % 2], in.rules, s, b, head, query, key, score_row, score_column);
    ptx::cp_async_wait_group<1>();
    __syncthreads();  // dO has come
    multiply<head_dim>(ds, RowsAsLines{shared.d_o}, score_row, RowsAsLines{shared.v}, score_column);
#pragma unroll
    for (int i = 0; i < score_columns / 2; ++i)
      ds[0][i] = p[0][i] * (ds[0][i] - shared.delta[score_row + threadIdx.x % 32 / 4 + i / 2 % 2 * 8]);
    put<tile_keys>(shared.ds, ds[0], score_row, score_column);
    __syncthreads();  // p and ds are complete

    multiply<queries>(dv_sum, Operand<T, tile_keys, false>{shared.p}, m_keys * row, RowsAsDepth{shared.d_o}, column);
    multiply<queries>(dk_sum, Operand<T, tile_keys, false>{shared.ds}, m_keys * row, RowsAsDepth{q}, column);
    float dq[m_queries][columns / 2] = {};
    multiply<tile_keys>(dq, Operand<T, tile_keys, true>{shared.ds}, m_queries * row, RowsAsDepth{shared.k}, column);

    const int64_t sum_row = head * rows_of_head + first_sum_row(in.sizes, s, b) + query;
    const Turn turn(turns ? turns + sum_row / sum_tile : nullptr, in.rules, s, query / sum_tile * sum_tile, key);
    if (query % sum_tile == 0) turn.wait();
#pragma unroll
    for (int i = 0; i < m_queries; ++i)
      add_patches<columns / 8>(dq_sum + sum_row * head_dim, dq[i], m_queries * row + 16 * i, column, head_dim);
    if ((query + queries) % sum_tile == 0) turn.pass();
  }

  ptx::cp_async_wait_group<0>();
  __syncthreads();  // nobody reads K and V any more
  store<head_dim>(shared.k, dk_sum, m_keys * row, column, in.rules.scale, dk, b, kv_head, s, key);
  store<head_dim>(shared.v, dv_sum, m_keys * row, column, 1.f, dv, b, kv_head, s, key);
}

template <class T, int head_dim>
void start(const Backward& x) {
  const Problem& p = x.forward;
  const dim3 grid = grid_of(divide_up(p.keys, tile_keys), p.kv_heads, p.batch);
  simt::Launch shape{grid, dim3(threads), sizeof(Shared<T, head_dim>)};
  shape.stream = p.stream;
  simt::launch(mma_sync<T, head_dim>, shape, Inputs<T>::of(x), Rows<T>::of(x.dk), Rows<T>::of(x.dv), x.dq_sum,
               sum_rows(p.total_queries, p.batch), x.deterministic ? reinterpret_cast<uint32_t*>(x.turns) : nullptr);
  write_dq<Patches, T>(x);
}

template <class T>
void choose(const Backward& x) {
  switch (x.forward.head_dim) {
    case 64: return start<T, 64>(x);
    case 96: return start<T, 96>(x);
    case 128: return start<T, 128>(x);
    case 192: return start<T, 192>(x);
    default: return start<T, 256>(x);
  }
}

}  // namespace

void mma_sync_02(const Backward& x) {
  const int head_dim = x.forward.head_dim;
  if (head_dim != 64 && head_dim != 96 && head_dim != 128 && head_dim != 192 && head_dim != 256)
    refuse("head width " + std::to_string(head_dim) + ": expected 64, 96, 128, 192 or 256 (mma_sync_02)");
  compute_delta(x);
  clear_sums(x);
  for_type(x.forward, [&](auto zero) { choose<decltype(zero)>(x); });
}

}  // namespace attention::backward
