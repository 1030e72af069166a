// The warps beside those that multiply, in steps 04 and 05. Warpgroup 0 computes nothing and gives its registers away:
// its first warp brings K and V, then Q with lse and dO with delta, each through a ring of its own; and each of the
// other warpgroups has a warp there that adds what it has left of dQ in shared memory to global memory, by bulk copies
// that add.
#pragma once
#include "attention/backward/hopper_backward.cuh"

namespace attention::backward {

// What all shapes have in shared memory. Shape: T, head_dim, keys, queries, groups (that multiply), pieces (of dQ, that
// each of them makes in a step), stages_q, stages_do.
template <class S>
struct Stages {
  using T = typename S::T;
  alignas(1024) T k[tile_elements(S::keys, S::head_dim)];
  alignas(1024) T v[tile_elements(S::keys, S::head_dim)];
  alignas(1024) T q[S::stages_q][tile_elements(S::queries, S::head_dim)];
  alignas(1024) T d_o[S::stages_do][tile_elements(S::queries, S::head_dim)];
  alignas(1024) float dq[S::groups][piece];
  alignas(16) float lse[S::stages_q][S::queries];
  alignas(16) float delta[S::stages_do][S::queries];
  uint64_t full_k, full_v, full_q[S::stages_q], empty_q[S::stages_q], full_do[S::stages_do], empty_do[S::stages_do];
  uint64_t full_dq[S::groups], empty_dq[S::groups];
};

template <class S>
PTX_INLINE void set_up(Stages<S>& shared) {
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(&shared.full_k, 1);
    ptx::mbarrier_init(&shared.full_v, 1);
    for (int i = 0; i < S::stages_q; ++i) {
      ptx::mbarrier_init(&shared.full_q[i], 1);
      ptx::mbarrier_init(&shared.empty_q[i], S::groups);
    }
    for (int i = 0; i < S::stages_do; ++i) {
      ptx::mbarrier_init(&shared.full_do[i], 1);
      ptx::mbarrier_init(&shared.empty_do[i], S::groups);
    }
    for (int i = 0; i < S::groups; ++i) {
      ptx::mbarrier_init(&shared.full_dq[i], warpgroup / 32);
      ptx::mbarrier_init(&shared.empty_dq[i], 1);
    }
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
}

// A warp fills a stage: its lane 0 a tile by TMA, all lanes value(query) of each query, asked for before the wait for
// the empty stage. The arrival comes last, and covers both.
template <class S, class T, class W, class Value>
PTX_INLINE void fill(T* tile, float* row, Value value, const CUtensorMap* map, uint64_t* full, uint64_t* empty,
                     uint32_t parity, const W& walk, int batch) {
  const int lane = threadIdx.x % 32;
  float x[S::queries / 32];
#pragma unroll
  for (int i = 0; i < S::queries / 32; ++i) x[i] = value(walk.first_query() + 32 * i + lane);
  ptx::mbarrier_wait(empty, parity ^ 1);
  if (lane == 0) {
    ptx::mbarrier_expect_tx(full, tile_bytes(S::queries, S::head_dim));
    hopper::load_tile<S::queries, S::head_dim>(tile, map, full, walk.query_row(), walk.head, batch);
  }
#pragma unroll
  for (int i = 0; i < S::queries / 32; ++i) row[32 * i + lane] = x[i];
  __syncwarp();
  if (lane == 0) ptx::mbarrier_arrive(full);
}

template <class S, class W>
PTX_INLINE void load(Stages<S>& shared, const CUtensorMap* map_q, const CUtensorMap* map_k, const CUtensorMap* map_v,
                     const CUtensorMap* map_do, const Given& given, W walk) {
  const int lane = threadIdx.x % 32, batch = walk.batch(given);
  if (lane == 0 && walk.steps > 0) {
    ptx::mbarrier_arrive_expect_tx(&shared.full_k, tile_bytes(S::keys, S::head_dim));
    hopper::load_tile<S::keys, S::head_dim>(shared.k, map_k, &shared.full_k, walk.key_row(), walk.kv_head, batch);
    ptx::mbarrier_arrive_expect_tx(&shared.full_v, tile_bytes(S::keys, S::head_dim));
    hopper::load_tile<S::keys, S::head_dim>(shared.v, map_v, &shared.full_v, walk.key_row(), walk.kv_head, batch);
  }
  Cursor<S::stages_q> to_q;
  Cursor<S::stages_do> to_do;
#pragma unroll 1
  for (int step = 0; step < walk.steps; ++step, walk.advance(), to_q.advance(), to_do.advance()) {
    const int q = to_q.stage, d = to_do.stage;
    const auto lse = [&](int query) { return lse_of(given, walk.s, walk.b, walk.head, query); };
    const auto delta = [&](int query) { return delta_of(given, walk.s, walk.b, walk.head, query); };
    fill<S>(shared.q[q], shared.lse[q], lse, map_q, &shared.full_q[q], &shared.empty_q[q], to_q.parity, walk, batch);
    fill<S>(shared.d_o[d], shared.delta[d], delta, map_do, &shared.full_do[d], &shared.empty_do[d], to_do.parity, walk,
            batch);
  }
}

// One thread: the pieces of dQ that warpgroup `group` makes, as they come.
template <class S, class W>
PTX_INLINE void add_pieces(Stages<S>& shared, const Given& given, W walk, int group) {
  constexpr int boxes = boxes_of(S::head_dim), columns_of_last = S::head_dim - 64 * (boxes - 1);
  uint32_t parity = 0;
#pragma unroll 1
  for (int step = 0; step < walk.steps; ++step, walk.advance()) {
    if (given.turns) {
      walk.wait_for_turn(given, S::groups);
      ptx::fence_proxy_async_global();
    }
#pragma unroll 1
    for (int i = group * S::pieces; i < (group + 1) * S::pieces; ++i, parity ^= 1) {
      const int columns = i % boxes + 1 < boxes ? 64 : columns_of_last;
      ptx::mbarrier_wait(&shared.full_dq[group], parity);
      ptx::bulk_reduce_add_f32(walk.dq_tile(given, S::head_dim) + i * piece, shared.dq[group],
                               64 * columns * sizeof(float));
      ptx::bulk_commit_group();
      ptx::bulk_wait_group_read<0>();
      ptx::mbarrier_arrive(&shared.empty_dq[group]);
    }
    if (given.turns) {  // not only read: added
      ptx::bulk_wait_group<0>();
      ptx::fence_proxy_async_global();
      __threadfence();
      atomicAdd(walk.turn(given), 1u);
    }
  }
  ptx::bulk_wait_group<0>();
}

// Warpgroup 0.
template <class S, class W>
PTX_INLINE void serve(Stages<S>& shared, const CUtensorMap* map_q, const CUtensorMap* map_k, const CUtensorMap* map_v,
                      const CUtensorMap* map_do, const Given& given, const W& walk) {
  static_assert(S::groups <= 3, "a warp for each, and one that loads");
  const int warp = ptx::uniform(threadIdx.x / 32);
  if (warp == 0) load<S>(shared, map_q, map_k, map_v, map_do, given, walk);
  else if (warp <= S::groups && threadIdx.x % 32 == 0) add_pieces<S>(shared, given, walk, warp - 1);
}

// ---- the warpgroups that multiply ----
// A piece of dQ to the warp that adds it.
template <class S>
PTX_INLINE void hand_over(Stages<S>& shared, const float (&dq)[piece / warpgroup], int group, uint32_t parity) {
  const int thread = threadIdx.x % warpgroup;
  ptx::mbarrier_wait(&shared.empty_dq[group], parity ^ 1);
#pragma unroll
  for (int i = 0; i < piece / warpgroup; ++i) shared.dq[group][i * warpgroup + thread] = dq[i];
  ptx::fence_proxy_async();
  __syncwarp();
  if (thread % 32 == 0) ptx::mbarrier_arrive(&shared.full_dq[group]);
}
// All of the warpgroup's threads have passed a barrier since they read the stage: one may speak for them.
PTX_INLINE void release(uint64_t* empty) {
  if (threadIdx.x % warpgroup == 0) ptx::mbarrier_arrive(empty);
}

}  // namespace attention::backward
