// Decoding over a paged cache (flash-decoding): each sequence's keys split over blocks, and a kernel that adds up.
//
// Counting first. A key and its value are 4 K bytes, and what is done with them is 4 K FLOPs for each row of queries.
// The rows are the H / G heads that share a head of the cache, times T tokens: one tile, so that the cache is read once
// (past 64 rows again, out of L2). A GPU has 300 FLOPs for each byte, so it waits for memory, and all there is to do is
// to keep copies in flight. What is read besides is small: 4 bytes of the table for each page. A sequence alone has too
// few heads to fill a GPU, hence the split. Its parts are 4 K + 8 bytes a row, written once and read once: of 16 rows
// and 256 keys 1/16 of the cache's bytes each way, out of L2, of 4096 keys 1/256.
//
// Up to 16 rows, each warp has its own keys, 16 of a tile, which it copies, waits for and multiplies alone: the loop
// has no barrier. Parts of warps and of splits are merged by the same rule (decode_merge.cuh). With more rows a warp
// has 16 of 64 and all keys of the tile. The ring has at most 72 KB: two blocks of 16 rows fit on a multiprocessor, on
// Ampere too.
// Refuses: head widths other than 64, 96, 128, 192 and 256, blocks that are no multiple of 16 keys.
#include <algorithm>

#include "attention/decode.h"
#include "attention/decode_merge.cuh"

namespace attention::decoding {
namespace {

constexpr int chunk = 8;  // elements in 16 bytes

template <class T, int head_dim, bool wide>
struct Plan {
  static constexpr int tile_keys = head_dim <= 128 ? 64 : 32, stages = 72 * 1024 / (tile_keys * head_dim * 4);
  static constexpr int warps_down = wide ? 4 : 1, warps_across = wide ? 1 : tile_keys / 16;
  static constexpr int warps = warps_down * warps_across, threads = 32 * warps;
  static constexpr int rows = 16 * warps_down, warp_keys = tile_keys / warps_across;
  static constexpr int blocks = wide ? 2 : 3;  // beside each other on a multiprocessor, as far as registers go

  struct alignas(128) Ring {
    T q[rows * head_dim], k[stages][tile_keys * head_dim], v[stages][tile_keys * head_dim];
  };
  struct alignas(128) Parts {             // of the warps, at the end, in the ring's place
    float o[warps][16][head_dim + chunk];  // 8 more: four rows of pairs then lie in different banks
    State state[warps][16];
  };
};

// Where the chunk of a row lies: any eight rows have theirs in eight different places of 128 bytes, all 32 banks. Rows
// of 96 elements, 192 bytes, differ by half a line already; the XOR must not leave their three groups of four chunks.
template <int head_dim>
__device__ __forceinline__ int place(int row, int column) {
  return row * head_dim + (column / chunk ^ (head_dim % 64 ? row / 2 % 4 : row % 8)) * chunk;
}

template <class T>
struct Inputs {
  Rows<const T> q;
  Rows<T> o;
  const T *k, *v;
  int64_t k_page, k_slot, k_head, v_page, v_slot, v_head, table_row;
  const int32_t *table, *lengths;
  int block_size, heads, kv_heads, queries, splits, least_keys;
  Rules rules;
  Results results;

  __device__ __forceinline__ int ratio() const { return heads / kv_heads; }
  // Row r of a head of the cache is head r % ratio of its queries, token r / ratio.
  __device__ __forceinline__ int token(int row) const { return row / ratio(); }
  __device__ __forceinline__ int head(int row) const { return blockIdx.y * ratio() + row % ratio(); }
  __device__ __forceinline__ int rows() const { return queries * ratio(); }

  // The keys of this block's split. They begin at a multiple of 16, so that 16 keys lie in one page.
  __device__ __forceinline__ Range keys(int length, int split, int tile_keys) const {
    const int first = max(0, length - queries - rules.left) / 16 * 16;
    const int tiles = max(divide_up(divide_up(length - first, tile_keys), splits), divide_up(least_keys, tile_keys));
    const int begin = first + split * tiles * tile_keys;
    return {begin, min(begin + tiles * tile_keys, length)};
  }
};

// Copies tiles of keys and values, one after the other. 16 keys lie in one page, and 32 threads or 64 copy them.
template <class T, int head_dim, bool wide>
struct Copies {
  using P = Plan<T, head_dim, wide>;
  static constexpr int threads = P::threads * 16 / P::tile_keys, row_chunks = head_dim / chunk;
  static_assert(16 * row_chunks % threads == 0, "every thread copies as many");
  const Inputs<T>& in;
  const int32_t* const table;
  const int thread, group, last;
  int key, page, slot;  // the next 16 keys of this thread's group, and where they lie

  __device__ __forceinline__ Copies(const Inputs<T>& in, const Range& keys)
      : in(in), table(in.table + blockIdx.z * in.table_row), thread(threadIdx.x % threads),
        group(threadIdx.x / threads * 16), last(keys.last), key(keys.first + group) {
    look_up();
  }
  // Done a copy ahead: the copy itself then need not wait for the table.
  __device__ __forceinline__ void look_up() {
    const int block = key / in.block_size;
    page = key < last ? table[block] : 0;
    slot = key - block * in.block_size;
  }

  // What lies past the last key of a tile becomes zeros: its probability is 0, and 0 times what was there might be NaN.
  // A tile past the last key is not read at all.
  __device__ __forceinline__ void start(T* k, T* v) {
    if (key - group < last) copy(k, v);
    key += P::tile_keys;
    look_up();
  }

 private:
  __device__ __forceinline__ void copy(T* k, T* v) const {
    const T* const k_from = in.k + page * in.k_page + slot * in.k_slot + blockIdx.y * in.k_head;
    const T* const v_from = in.v + page * in.v_page + slot * in.v_slot + blockIdx.y * in.v_head;
#pragma unroll
    for (int i = thread; i < 16 * row_chunks; i += threads) {
      const int row = i / row_chunks, column = i % row_chunks * chunk, to = place<head_dim>(group + row, column);
      const int bytes = key + row < last ? 16 : 0;
      ptx::cp_async(k + to, k_from + row * in.k_slot + column, bytes);
      ptx::cp_async(v + to, v_from + row * in.v_slot + column, bytes);
    }
  }
};

template <class T, int head_dim, bool wide>
__device__ __forceinline__ void copy_queries(T* to, const Inputs<T>& in, int first_row) {
  using P = Plan<T, head_dim, wide>;
  constexpr int row_chunks = head_dim / chunk;
#pragma unroll 1
  for (int i = threadIdx.x; i < P::rows * row_chunks; i += P::threads) {
    const int row = first_row + i / row_chunks, column = i % row_chunks * chunk;
    const bool inside = row < in.rows();
    const T* const from = inside ? in.q.at(blockIdx.z, in.token(row), in.head(row)) + column : in.q.data;
    ptx::cp_async(to + place<head_dim>(i / row_chunks, column), from, inside ? 16 : 0);
  }
}

// scores = q k^T of 16 rows and n keys. Q comes from shared memory each time: its registers are the output's.
template <class T, int head_dim, int n>
__device__ __forceinline__ void multiply_keys(float (&scores)[n / 2], const T* q, const T* k, int row, int key) {
  const int lane = threadIdx.x % 32;
  float sum[n / 8][4] = {};
#pragma unroll
  for (int column = 0; column < head_dim; column += 16) {
    uint32_t a[4], b[4];
    ptx::ldmatrix_x4(a, q + place<head_dim>(row + lane % 16, column + lane / 16 * chunk));
#pragma unroll
    for (int j = 0; j < n / 16; ++j) {
      const int at = key + 16 * j + lane / 16 * 8 + lane % 8;
      ptx::ldmatrix_x4(b, k + place<head_dim>(at, column + lane / 8 % 2 * chunk));
      ptx::mma_m16n8k16<T>(sum[2 * j], a, {b[0], b[1]}, sum[2 * j]);
      ptx::mma_m16n8k16<T>(sum[2 * j + 1], a, {b[2], b[3]}, sum[2 * j + 1]);
    }
  }
#pragma unroll
  for (int i = 0; i < n / 2; ++i) scores[i] = sum[i / 4][i % 4];
}

// o = factor o + p v.
template <class T, int head_dim, int n>
__device__ __forceinline__ void add_values(float (&o)[head_dim / 8][4], const float (&factor)[2],
                                           const float (&p)[n / 2], const T* v, int key) {
  const int lane = threadIdx.x % 32;
  uint32_t a[n / 16][4], b[4];
  to_operand<T, n>(p, a);
#pragma unroll
  for (int i = 0; i < head_dim / 2; ++i) o[i / 4][i % 4] *= factor[i / 2 % 2];
#pragma unroll
  for (int j = 0; j < n / 16; ++j)
#pragma unroll
    for (int i = 0; i < head_dim / 8; i += 2) {
      ptx::ldmatrix_x4<true>(b, v + place<head_dim>(key + 16 * j + lane % 16, 8 * i + lane / 16 * chunk));
      ptx::mma_m16n8k16<T>(o[i], a[j], {b[0], b[1]}, o[i]);
      ptx::mma_m16n8k16<T>(o[i + 1], a[j], {b[2], b[3]}, o[i + 1]);
    }
}

template <class T, int head_dim, bool wide>
__device__ __forceinline__ void keep_part(const Softmax& softmax, const float (&o)[head_dim / 8][4]) {
  auto& parts = simt::dynamic_shared<typename Plan<T, head_dim, wide>::Parts>();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float sum = quad_sum(softmax.sum[r]);
    if (lane % 4 == 0) parts.state[warp][lane / 4 + 8 * r] = {softmax.most[r], sum};
#pragma unroll
    for (int i = 0; i < head_dim / 8; ++i)
      *reinterpret_cast<float2*>(&parts.o[warp][lane / 4 + 8 * r][8 * i + lane % 4 * 2]) =
          make_float2(o[i][2 * r], o[i][2 * r + 1]);
  }
}

// The parts of the warps become the rows of this block: results, or the part of this split.
template <class T, int head_dim, bool wide>
__device__ __forceinline__ void store_rows(const Inputs<T>& in, int first_row, int split) {
  using P = Plan<T, head_dim, wide>;
  const auto& parts = simt::dynamic_shared<typename P::Parts>();
#pragma unroll 1
  for (int i = threadIdx.x * Merge::columns; i < P::rows * head_dim; i += P::threads * Merge::columns) {
    const int row = i / head_dim, column = i % head_dim;
    if (first_row + row >= in.rows()) break;
    const int token = in.token(first_row + row), head = in.head(first_row + row);
    Merge merged(in.rules.scale);
    const int warp = row / 16 * P::warps_across;
#pragma unroll
    for (int w = 0; w < P::warps_across; ++w) merged.look_at(parts.state[warp + w][row % 16]);
#pragma unroll
    for (int w = 0; w < P::warps_across; ++w)
      merged.add(parts.state[warp + w][row % 16], &parts.o[warp + w][row % 16][column]);
    const int place = (blockIdx.z * in.heads + head) * in.queries + token;
    if (in.splits > 1) in.results.store_split(merged, place, split, head_dim, column);
    else in.results.store(merged, in.o.at(blockIdx.z, token, head) + column, place, head, column == 0);
  }
}

template <class T, int head_dim, bool wide>
__global__ void
    __launch_bounds__(Plan<T, head_dim, wide>::threads, Plan<T, head_dim, wide>::blocks) decode(const Inputs<T> in) {
  using P = Plan<T, head_dim, wide>;
  constexpr int n = P::warp_keys;
  auto& ring = simt::dynamic_shared<typename P::Ring>();
  const int split = blockIdx.x % in.splits, first_row = blockIdx.x / in.splits * P::rows;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const Sequence sequence = {in.queries, in.lengths[blockIdx.z], 0, 0};
  const Range keys = in.keys(sequence.keys, split, P::tile_keys);

  Copies<T, head_dim, wide> copies(in, keys);
  const auto copy = [&](int stage) {
    copies.start(ring.k[stage], ring.v[stage]);
    ptx::cp_async_commit_group();
  };
  copy_queries<T, head_dim, wide>(ring.q, in, first_row);
#pragma unroll
  for (int stage = 0; stage < P::stages - 1; ++stage) copy(stage);
  ptx::cp_async_wait_group<P::stages - 2>();
  __syncthreads();  // each thread waits for what it copied of Q, and all of them read all of it

  const Rules& rules = in.rules;
  const float scale_log2 = rules.scale * log2_e;
  const int row = warp / P::warps_across * 16, tile_key = warp % P::warps_across * n;
  const int tokens[2] = {in.token(first_row + row + lane / 4), in.token(first_row + row + lane / 4 + 8)};
  Softmax softmax;
  float o[head_dim / 8][4] = {};
  int stage = 0, free_stage = P::stages - 1;
#pragma unroll 1
  for (int first = keys.first; first < keys.last; first += P::tile_keys) {
    ptx::cp_async_wait_group<P::stages - 2>();
    if (wide) __syncthreads();
    else __syncwarp();
    copy(free_stage);  // nobody reads the tile before this one any more
    const int key = first + tile_key;
    float scores[n / 2], factor[2];
    multiply_keys<T, head_dim, n>(scores, ring.q, ring.k[stage], row, tile_key);
    if (!rules.plain(sequence, 0, in.queries, key, n))
#pragma unroll
      for (int i = 0; i < n / 2; ++i)
        scores[i] = rules.score(sequence, 0, 0, tokens[i / 2 % 2], key + lane % 4 * 2 + 8 * (i / 4) + i % 2, scores[i]);
    softmax.add<n>(scores, scale_log2, factor);
    add_values<T, head_dim, n>(o, factor, scores, ring.v[stage], tile_key);
    free_stage = stage;
    stage = stage + 1 < P::stages ? stage + 1 : 0;
  }
  __syncthreads();  // all copies have been waited for: the ring is free for the parts
  keep_part<T, head_dim, wide>(softmax, o);
  __syncthreads();
  store_rows<T, head_dim, wide>(in, first_row, split);
}

template <class T>
Inputs<T> inputs_of(const Decode& p) {
  const auto data = [](const Pages& x) { return static_cast<const T*>(x.data); };
  Problem rules = {};
  rules.scale = p.scale, rules.softcap = p.softcap, rules.left = p.left, rules.right = 0;
  return {{static_cast<const T*>(p.q.data), p.q.batch, p.q.row, p.q.head}, Rows<T>::of(p.o), data(p.k), data(p.v),
          p.k.page, p.k.slot, p.k.head, p.v.page, p.v.slot, p.v.head, p.table_row, p.table, p.lengths,
          p.block_size, p.heads, p.kv_heads, p.queries, p.splits, p.least_keys, Rules::of(rules),
          Results::of(p)};
}

template <class T, int head_dim, bool wide>
void start(const Decode& p) {
  using P = Plan<T, head_dim, wide>;
  const int tiles = divide_up(p.queries * (p.heads / p.kv_heads), P::rows);
  simt::Launch shape;
  shape.grid = dim3(tiles * p.splits, p.kv_heads, p.batch);
  shape.block = dim3(P::threads);
  shape.shared_bytes = std::max(sizeof(typename P::Ring), sizeof(typename P::Parts));
  shape.stream = p.stream;
  simt::launch(decode<T, head_dim, wide>, shape, inputs_of<T>(p));
  if (p.splits > 1) start_merge<T>(p);
}

template <class T, int head_dim>
void start_rows(const Decode& p) {
  if (p.queries * (p.heads / p.kv_heads) <= 16) start<T, head_dim, false>(p);
  else start<T, head_dim, true>(p);
}

template <class T>
void start_width(const Decode& p) {
  switch (p.head_dim) {
    case 64: return start_rows<T, 64>(p);
    case 96: return start_rows<T, 96>(p);
    case 128: return start_rows<T, 128>(p);
    case 192: return start_rows<T, 192>(p);
    case 256: return start_rows<T, 256>(p);
    default: refuse("head width " + std::to_string(p.head_dim) + ": expected 64, 96, 128, 192 or 256");
  }
}

}  // namespace

void split_kv(const Decode& p) {
  if (p.block_size % 16) refuse("blocks of " + std::to_string(p.block_size) + " keys: expected a multiple of 16");
  if (p.type == DataType::bf16) start_width<__nv_bfloat16>(p);
  else start_width<__half>(p);
}

}  // namespace attention::decoding
