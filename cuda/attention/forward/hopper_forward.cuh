// What steps 04-07 share: which queries a block has and which keys they see, rings of K and V with their producer, and
// the ending of a row. They differ in who multiplies when.
//
// A block has one tile of queries of one head. It walks its keys from the last tile to the first: the tiles that a
// causal mask cuts come first, and the rest of the way is plain. The grid is (tiles of the longest sequence, heads,
// batch); the last queries see most keys under a causal mask, so their tiles start first and the short ones fill the
// gaps.
//
// Refused with std::invalid_argument, before any launch: element types other than bf16, head widths other than 64 and
// 128, more than 65535 heads or sequences.
#pragma once
#include <type_traits>

#include "attention/hopper.cuh"

namespace attention::forward::ladder {

using hopper::warpgroup, hopper::tile_elements, hopper::tile_bytes;
using T = __nv_bfloat16;

// ---- what a block has to do ----
struct Tile {
  Sequence sequence;
  int batch, head, query;  // the first of its queries
  int key, count;          // the first key of its first tile of keys, and how many tiles there are: perhaps none

  // Rows of the sequence as TMA counts them.
  PTX_INLINE int query_row() const { return sequence.first_query + query; }
  PTX_INLINE int key_row(int of_key) const { return sequence.first_key + of_key; }
};

// The keys of the i-th step of the walk begin here.
template <int tile_keys>
PTX_INLINE int step_key(const Tile& tile, int i) { return tile.key + (tile.count - 1 - i) * tile_keys; }

// `query` is negative where a sequence is shorter than the longest one: that block has nothing to do.
template <int tile_queries, int tile_keys>
PTX_INLINE Tile tile_of_block(const Sizes& sizes, const Rules& rules) {
  Tile tile = {};
  tile.batch = blockIdx.z, tile.head = blockIdx.y;
  tile.sequence = sizes.sequence(tile.batch);
  tile.query = (divide_up(tile.sequence.queries, tile_queries) - 1 - int(blockIdx.x)) * tile_queries;
  if (tile.query < 0) return tile;
  const Range keys = rules.keys_of(tile.sequence, tile.query, tile.query + tile_queries);
  tile.key = keys.first / tile_keys * tile_keys;
  tile.count = keys.first < keys.last ? divide_up(keys.last - tile.key, tile_keys) : 0;
  return tile;
}

struct Output {
  Rows<T> o;
  float* lse;
  int64_t lse_batch, lse_head;
  static Output of(const Problem& p) { return {Rows<T>::of(p.o), p.lse, p.lse_batch, p.lse_head}; }
};

// ---- a warpgroup's 64 rows, from row `query` of the sequence on ----
PTX_INLINE int row_of_lane() { return 16 * (threadIdx.x % warpgroup / 32) + threadIdx.x % 32 / 4; }

// Products of 64 queries and n keys become scores, and those exp(score - most): see Softmax::add.
template <int n>
PTX_INLINE void softmax_step(float (&s)[n / 2], Softmax& softmax, float (&factor)[2], const Rules& rules,
                             const Tile& tile, int query, int key) {
  if (!rules.plain(tile.sequence, query, 64, key, n))
    edit<n>(s, rules, tile.sequence, tile.batch, tile.head, query + row_of_lane(), key + 2 * (threadIdx.x % 4));
  softmax.add<n>(s, rules.scale * log2_e, factor);
}

// After the last keys: o is divided by the sums, o and lse go to memory. Rows that saw nothing become zeros.
template <int head_dim>
PTX_INLINE void finish(float (&o)[head_dim / 2], Softmax& softmax, const Rules& rules, const Output& output,
                       const Tile& tile, int query) {
  float factor[2], lse[2];
  softmax.finish(rules.scale * log2_e, rules.sink ? rules.sink[tile.head] : -INFINITY, factor, lse);
  multiply_rows<head_dim>(o, factor);
  const int rows_left = tile.sequence.queries - query, first = tile.sequence.first_query + query;
  hopper::store_rows<head_dim>(o, output.o.at(tile.batch, first, tile.head), output.o.row, rows_left);
  float* const to = output.lse + tile.batch * output.lse_batch + tile.head * output.lse_head + first;
#pragma unroll
  for (int r = 0; r < 2; ++r)
    if (threadIdx.x % 4 == 0 && row_of_lane() + 8 * r < rows_left) to[row_of_lane() + 8 * r] = lse[r];
}

// ---- a producer and two consumers (05-07) ----
// Two warpgroups of 64 queries each share every tile of K and V: half the traffic of two blocks. K and V have a ring
// each: K is free again while its scores are still in the softmax, and its successor should be on the way by then.
template <int head_dim_>
struct Shape {
  static constexpr int head_dim = head_dim_, consumers = 2, queries = 64 * consumers, keys = 128;
  static constexpr int stages = head_dim == 64 ? 4 : 2;
  static constexpr int threads = (consumers + 1) * warpgroup;
  // A thread: 168 at the start, 65536 shared by all; then the producer gives away what it does not need.
  static constexpr int producer_registers = 24, consumer_registers = 240;

  struct Ring {
    alignas(1024) T tile[stages][tile_elements(keys, head_dim)];
  };
  struct Shared {
    alignas(1024) T q[tile_elements(queries, head_dim)];
    Ring k, v;
    uint64_t full_q, full_k[stages], full_v[stages], empty_k[stages], empty_v[stages];
  };
  static_assert(sizeof(Shared) <= 227 * 1024, "shared memory of a block");
  using Cursor = hopper::Cursor<stages>;
};

// All threads, before anything else: barriers that everybody may use afterwards.
template <class S>
PTX_INLINE void make_barriers(typename S::Shared& shared) {
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(&shared.full_q, 1);
    for (int i = 0; i < S::stages; ++i) {
      ptx::mbarrier_init(&shared.full_k[i], 1);
      ptx::mbarrier_init(&shared.full_v[i], 1);
      ptx::mbarrier_init(&shared.empty_k[i], S::consumers);
      ptx::mbarrier_init(&shared.empty_v[i], S::consumers);
    }
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
}

// One thread: the queries, then K and V of every step, as soon as both consumers have let go of a stage. Nothing where
// there are no keys: nobody would wait for the queries, and a block may not end before its copies have.
template <class S>
PTX_INLINE void produce(typename S::Shared& shared, const CUtensorMap* map_q, const CUtensorMap* map_k,
                        const CUtensorMap* map_v, const Sizes& sizes, const Tile& tile) {
  if (tile.count == 0) return;
  const int batch = sizes.starts_q ? 0 : tile.batch, kv_head = sizes.kv_head(tile.head);
  ptx::mbarrier_arrive_expect_tx(&shared.full_q, tile_bytes(S::queries, S::head_dim));
  hopper::load_tile<S::queries, S::head_dim>(shared.q, map_q, &shared.full_q, tile.query_row(), tile.head, batch);
  const auto load = [&](T* to, const CUtensorMap* map, uint64_t* full, uint64_t* empty, uint32_t parity, int row) {
    ptx::mbarrier_wait(empty, parity ^ 1);
    ptx::mbarrier_arrive_expect_tx(full, tile_bytes(S::keys, S::head_dim));
    hopper::load_tile<S::keys, S::head_dim>(to, map, full, row, kv_head, batch);
  };
  typename S::Cursor at;
#pragma unroll 1
  for (int i = 0; i < tile.count; ++i, at.advance()) {
    const int row = tile.key_row(step_key<S::keys>(tile, i));
    load(shared.k.tile[at.stage], map_k, &shared.full_k[at.stage], &shared.empty_k[at.stage], at.parity, row);
    load(shared.v.tile[at.stage], map_v, &shared.full_v[at.stage], &shared.empty_v[at.stage], at.parity, row);
  }
}

// The two products of a consumer, issued and committed as a group each; until they have been waited for, s, o and p
// belong to the tensor cores.
template <class S>
PTX_INLINE void issue_scores(float (&s)[S::keys / 2], const typename S::Shared& shared, int consumer, int stage) {
  hopper::multiply_along_head<S::keys, S::queries, S::keys, S::head_dim>(s, shared.q, consumer * 64,
                                                                         shared.k.tile[stage], 0);
  ptx::wgmma_commit_group();
}
template <class S>
PTX_INLINE void issue_output(float (&o)[S::head_dim / 2], const uint32_t (&p)[S::keys / 16][4],
                             const typename S::Shared& shared, int stage) {
  hopper::multiply_along_rows<S::keys, S::keys, S::head_dim>(o, p, shared.v.tile[stage], 0);
  ptx::wgmma_commit_group();
}

// One arrival of a consumer, whose products with the stage have been waited for.
PTX_INLINE void release(uint64_t* empty) {
  if (threadIdx.x % warpgroup == 0) ptx::mbarrier_arrive(empty);
}

// ---- two consumers that take turns (06, 07) ----
// Named barrier 1 + c lets consumer c issue its products: its own threads wait there, those of the other only arrive.
// Every turn taken needs one given: consumer 1 gives the first one before its own, and keeps its last one to itself.
PTX_INLINE void take_turn(int consumer) { ptx::named_barrier_sync(1 + consumer, 2 * warpgroup); }
PTX_INLINE void give_turn(int consumer) { ptx::named_barrier_arrive(2 - consumer, 2 * warpgroup); }

// ---- host ----
// Calls start(std::integral_constant<int, head width>). static: see matmul/hopper.cuh, one name for all steps.
template <class Start>
static void for_head_dim(const Problem& p, Start start) {
  if (p.type != DataType::bf16) refuse("the element type of q: steps 04 to 07 take bfloat16, step 09 float16 too");
  if (p.head_dim == 64) start(std::integral_constant<int, 64>());
  else if (p.head_dim == 128) start(std::integral_constant<int, 128>());
  else
    refuse("the head width of q is " + std::to_string(p.head_dim) + ": steps 04 to 07 take 64 and 128, step 09 others");
}

using Kernel = void (*)(CUtensorMap, CUtensorMap, CUtensorMap, Sizes, Rules, Output);
inline void launch(Kernel kernel, const Problem& p, int tile_queries, int tile_keys, int threads, size_t shared_bytes) {
  if (p.heads > 65535 || p.batch > 65535)
    refuse(std::to_string(p.heads) + " heads of q and " + std::to_string(p.batch) +
           " sequences: expected at most 65535 of each");
  simt::launch(kernel,
               simt::Launch{dim3(divide_up(p.queries, tile_queries), p.heads, p.batch), dim3(threads), shared_bytes, 1,
                            false, p.stream},
               hopper::query_map(p.q, p, tile_queries), hopper::key_map(p.k, p, tile_keys),
               hopper::key_map(p.v, p, tile_keys), Sizes::of(p), Rules::of(p), Output::of(p));
}
template <class S>
static void launch(Kernel kernel, const Problem& p) {
  launch(kernel, p, S::queries, S::keys, S::threads, sizeof(typename S::Shared));
}

}  // namespace attention::forward::ladder
