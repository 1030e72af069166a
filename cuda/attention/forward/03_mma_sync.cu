// Step 03: tensor cores of Ampere, FlashAttention-2's way of sharing the work. A warp has 16 queries and all keys: no
// row of the softmax is split between warps, and scores never leave its registers. Accumulators of q k' become, rounded
// to 16 bits, the left operand of the product with V, lane for lane.
//
// cp.async brings the next tile of K and V while this one is multiplied; one barrier a tile. Q passes through the stage
// that is filled second on its way to registers. The 16-byte chunks of a row are permuted by an XOR with its number, so
// that the eight rows that ldmatrix reads at once lie in different banks.
// Limit: each warp reads all of K and V from shared memory for its 16 queries, 16 bytes a lane for two mma.sync, and
// exponentials and products of a warp take turns. A Hopper's tensor cores read operands in place: step 04.
// Refuses: head widths other than 64, 96, 128, 192, 256. Any GPU from Ampere on.
#include "attention/forward/blocks.cuh"

namespace attention::forward {
namespace {

constexpr int warps = 4, threads = 32 * warps, tile_queries = 16 * warps, stages = 2;
constexpr int chunk = 8;  // elements in 16 bytes

template <int head_dim>
struct Tile {
  static constexpr int keys = head_dim <= 128 ? 64 : 32;  // 64 KB at most, so that two blocks fit on an A100
  static constexpr int elements = keys * head_dim;
  static_assert(2 * keys >= tile_queries, "a stage holds Q");
  // Rows are permuted in groups of 8 chunks, which are all banks; of 4 where 8 do not divide a row. Those rows begin 16
  // banks apart, and two of them share a permutation.
  static constexpr int group = head_dim % 64 ? 4 : 8;
  __device__ static __forceinline__ int swizzle(int row) { return row * group / 8 % group; }
  // Where the chunk that holds (row, column) lies. Columns of different groups are a constant apart: the compiler then
  // keeps one address for all groups, where a plain XOR would take a register for each.
  __device__ static __forceinline__ int place(int row, int column) {
    const int first = column / (group * chunk) * (group * chunk);
    return row * head_dim + first + ((column - first) / chunk ^ swizzle(row)) * chunk;
  }
};

// Each stage holds a tile of K and one of V. At first, the second one holds Q; at last, all of it holds o.
template <class T, int head_dim>
struct alignas(128) Shared {
  T kv[stages][2][Tile<head_dim>::elements];
};

// Starts the copies of `rows` rows to a tile: 16 bytes a thread, `group` of which share a row. Rows past the last one
// become copies of it: they do not count, but what lies there may be NaN, and 0 times that is no 0.
template <int rows, int head_dim, class T>
__device__ __forceinline__ void copy_rows(T* to, const T* first_row, int64_t stride, int rows_left) {
  constexpr int group = Tile<head_dim>::group, rows_apart = threads / group;
  const int down = threadIdx.x / group, along = threadIdx.x % group * chunk;
  T* const corner = to + Tile<head_dim>::place(down, along);
#pragma unroll
  for (int i = 0; i < rows / rows_apart; ++i) {  // rows a multiple of 8 apart are permuted alike
    const int row = down + i * rows_apart;
    const T* const from = first_row + min(row, rows_left - 1) * stride + along;
#pragma unroll
    for (int column = 0; column < head_dim; column += group * chunk)
      ptx::cp_async(corner + i * rows_apart * head_dim + column, from + column);
  }
}

template <class T>
__device__ __forceinline__ void multiply(float* d, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  float(&sum)[4] = *reinterpret_cast<float(*)[4]>(d);
  const uint32_t b[2] = {b0, b1};
  ptx::mma_m16n8k16<T>(sum, a, b, sum);
}

// x = q k' of a warp's 16 queries. Of four 8 x 8 matrices of K, two are 16 columns of 8 keys: one mma.sync.
template <int keys, int head_dim, class T>
__device__ __forceinline__ void multiply_keys(float (&x)[keys / 2], const uint32_t (&q)[head_dim / 16][4], const T* k) {
  const int lane = threadIdx.x % 32, row = lane % 8 + lane / 16 * 8, column = lane / 8 % 2 * chunk;
#pragma unroll
  for (int i = 0; i < keys / 2; ++i) x[i] = 0.f;
#pragma unroll
  for (int d = 0; d < head_dim; d += 16) {
    const T* const from = k + Tile<head_dim>::place(row, d + column);
#pragma unroll
    for (int key = 0; key < keys; key += 16) {
      uint32_t part[4];
      ptx::ldmatrix_x4(part, from + key * head_dim);
      multiply<T>(x + key / 2, q[d / 16], part[0], part[1]);
      multiply<T>(x + key / 2 + 4, q[d / 16], part[2], part[3]);
    }
  }
}

// o += p v. V's rows are keys: ldmatrix transposes, and two of four matrices are 16 keys of 8 columns.
template <int keys, int head_dim, class T>
__device__ __forceinline__ void multiply_values(float (&o)[head_dim / 2], const uint32_t (&p)[keys / 16][4],
                                                const T* v) {
  const int lane = threadIdx.x % 32, row = lane % 16, column = lane / 16 * chunk;
#pragma unroll
  for (int d = 0; d < head_dim; d += 16) {
    const T* const from = v + Tile<head_dim>::place(row, d + column);
#pragma unroll
    for (int key = 0; key < keys; key += 16) {
      uint32_t part[4];
      ptx::ldmatrix_x4<true>(part, from + key * head_dim);
      multiply<T>(o + d / 2, p[key / 16], part[0], part[1]);
      multiply<T>(o + d / 2 + 4, p[key / 16], part[2], part[3]);
    }
  }
}

// A warp's 16 rows of o through its own part of shared memory, to be written in whole chunks.
template <int head_dim, class T>
__device__ __forceinline__ void store_rows(const float (&o)[head_dim / 2], T* patch, T* first_row, int64_t stride,
                                           int rows_left) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < head_dim / 2; i += 2)
    *reinterpret_cast<uint32_t*>(patch + Tile<head_dim>::place(lane / 4 + i / 2 % 2 * 8, i / 4 * chunk) +
                                 lane % 4 * 2) = pack<T>(o[i], o[i + 1]);
  __syncwarp();
  constexpr int group = Tile<head_dim>::group, rows_apart = 32 / group;
  const int down = lane / group, along = lane % group * chunk;
#pragma unroll
  for (int row = down; row < down + 16; row += rows_apart) {
    if (row >= rows_left) continue;
#pragma unroll
    for (int column = along; column < head_dim; column += group * chunk)
      ptx::store_v4(first_row + row * stride + column,
                    *reinterpret_cast<const uint4*>(patch + Tile<head_dim>::place(row, column)));
  }
}

template <int head_dim, class T>
__global__ void __launch_bounds__(threads, 2)
    mma_sync(Rows<T> q, Rows<T> k, Rows<T> v, Rows<T> o, float* lse, int64_t lse_batch, int64_t lse_head, Sizes sizes,
             Rules rules) {
  constexpr int keys = Tile<head_dim>::keys;
  auto& shared = simt::dynamic_shared<Shared<T, head_dim>>();
  const Block block = block_of(sizes, tile_queries);
  const int b = block.b, head = block.head;
  const Sequence s = sizes.sequence(b);
  if (block.first_query >= s.queries) return;
  const int warp = ptx::uniform(threadIdx.x / 32), lane = threadIdx.x % 32;
  const int first_query = block.first_query + 16 * warp;  // of the warp

  const Range range = rules.keys_of(s, block.first_query, block.first_query + tile_queries);
  const Range mine = rules.keys_of(s, first_query, first_query + 16);
  const auto copy = [&](int key, int stage) {
    const int kv_head = sizes.kv_head(head);
    copy_rows<keys, head_dim>(shared.kv[stage][0], k.at(b, s.first_key + key, kv_head), k.row, s.keys - key);
    copy_rows<keys, head_dim>(shared.kv[stage][1], v.at(b, s.first_key + key, kv_head), v.row, s.keys - key);
  };

  T* const q_tile = shared.kv[1][0];
  copy_rows<tile_queries, head_dim>(q_tile, q.at(b, s.first_query + block.first_query, head), q.row,
                                    s.queries - block.first_query);
  ptx::cp_async_commit_group();
  if (range.first < range.last) copy(range.first, 0);
  ptx::cp_async_commit_group();
  ptx::cp_async_wait_group<1>();
  __syncthreads();
  uint32_t q_part[head_dim / 16][4];
#pragma unroll
  for (int d = 0; d < head_dim; d += 16)
    ptx::ldmatrix_x4(q_part[d / 16], q_tile + Tile<head_dim>::place(16 * warp + lane % 16, d + lane / 16 * chunk));

  Softmax softmax;
  float sums[head_dim / 2] = {}, factor[2];
  const float scale_log2 = rules.scale * log2_e;
  int stage = 0;
#pragma unroll 1
  for (int key = range.first; key < range.last; key += keys) {
    ptx::cp_async_wait_group<0>();
    __syncthreads();  // this tile is there, and nobody reads the one before it, or Q
    if (key + keys < range.last) copy(key + keys, 1 - stage);
    ptx::cp_async_commit_group();
    if (key < mine.last && key + keys > mine.first) {
      float x[keys / 2];
      multiply_keys<keys, head_dim>(x, q_part, shared.kv[stage][0]);
      if (!rules.plain(s, first_query, 16, key, keys)) {
        const int row = first_query + lane / 4, column = key + lane % 4 * 2;
        if constexpr (head_dim < 256) {
          edit<keys>(x, rules, s, b, head, row, column);
        } else {  // `edit`, one score after the other: slower, but there is no register left
#pragma unroll
          for (int i = 0; i < keys / 2; ++i)
            x[i] = rules.score(s, b, head, row + 8 * (i / 2 % 2), column + 8 * (i / 4) + i % 2, x[i]);
        }
      }
      softmax.add<keys>(x, scale_log2, factor);
      multiply_rows<head_dim>(sums, factor);
      uint32_t p[keys / 16][4];
      to_operand<T, keys>(x, p);
      multiply_values<keys, head_dim>(sums, p, shared.kv[stage][1]);
    }
    stage = 1 - stage;
  }

  float row_lse[2];
  softmax.finish(scale_log2, rules.sink ? rules.sink[head] : -INFINITY, factor, row_lse);
  multiply_rows<head_dim>(sums, factor);
  ptx::cp_async_wait_group<0>();
  __syncthreads();  // nobody reads K, V or Q any more
  const int rows_left = s.queries - first_query;
  store_rows<head_dim>(sums, &shared.kv[0][0][0] + 16 * warp * head_dim, o.at(b, s.first_query + first_query, head),
                       o.row, rows_left);
  float* const to = lse + b * lse_batch + head * lse_head + s.first_query + first_query;
  for (int r = 0; r < 2; ++r)
    if (lane % 4 == 0 && lane / 4 + 8 * r < rows_left) to[lane / 4 + 8 * r] = row_lse[r];
}

}  // namespace

void mma_sync_03(const Problem& p) {
  for_head_dim(p, "mma_sync_03", [&](auto width) {
    for_type(p, [&](auto element) {
      using T = decltype(element);
      constexpr int head_dim = width;
      simt::launch(mma_sync<head_dim, T>, grid_of_tiles(p, tile_queries, threads, sizeof(Shared<T, head_dim>)),
                   Rows<T>::of(p.q), Rows<T>::of(p.k), Rows<T>::of(p.v), Rows<T>::of(p.o), p.lse, p.lse_batch,
                   p.lse_head, Sizes::of(p), Rules::of(p));
    });
  });
}

}  // namespace attention::forward
