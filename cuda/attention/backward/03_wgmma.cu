// Step 03: Hopper's tensor cores. Step 02 lets warps carry fragments from shared memory through registers into
// mma.sync, and computes the scores with rows = queries, so that p and ds go back through shared memory for the
// products of dV and dK. Here a warpgroup owns 64 keys and multiplies K Q' and V dO' by wgmma: what comes out is p' and
// ds', the left operands of dV += p' dO and dK += ds' Q, from registers. TMA brings the next Q and dO while these are
// multiplied. ds' goes to shared memory once, and the two warpgroups share the work of dQ = ds K: each takes half of
// the columns, or half of the queries where a tile has 128.
//
// dQ is added to memory by float atomics, each thread its own: 32 a tile. Head widths 64 and 128 of bf16.
#include "attention/backward/hopper_backward.cuh"

namespace attention::backward {
namespace {

template <int head_dim_>
struct Wgmma03 {
  using T = __nv_bfloat16;
  static constexpr int head_dim = head_dim_, groups = 2, keys = 64 * groups, queries = head_dim == 64 ? 128 : 64;
  static constexpr int threads = groups * warpgroup, stages = 2;

  struct Shared {
    alignas(1024) T k[tile_elements(keys, head_dim)];
    alignas(1024) T v[tile_elements(keys, head_dim)];
    alignas(1024) T q[stages][tile_elements(queries, head_dim)];
    alignas(1024) T d_o[stages][tile_elements(queries, head_dim)];
    alignas(1024) T ds[2][keys * queries];  // in turn: the other warpgroup may still read the one before
    alignas(16) float lse[stages][queries];
    alignas(16) float delta[stages][queries];
    uint64_t full_kv, full[stages];
  };
  static_assert(sizeof(Shared) <= 227 * 1024, "shared memory of a block");
};

// One thread starts the copies of a step, and all bring its lse and delta: a barrier of the block comes after.
template <class S, class W>
PTX_INLINE void load_step(typename S::Shared& shared, const CUtensorMap* q, const CUtensorMap* d_o, const Given& given,
                          const W& walk, int stage) {
  if (threadIdx.x == 0) {
    uint64_t* const full = &shared.full[stage];
    const int row = walk.query_row(), batch = walk.batch(given);
    ptx::mbarrier_arrive_expect_tx(full, 2 * tile_bytes(S::queries, S::head_dim));
    hopper::load_tile<S::queries, S::head_dim>(shared.q[stage], q, full, row, walk.head, batch);
    hopper::load_tile<S::queries, S::head_dim>(shared.d_o[stage], d_o, full, row, walk.head, batch);
  }
  if (threadIdx.x < S::queries) {
    const int query = walk.first_query() + threadIdx.x;
    shared.lse[stage][threadIdx.x] = lse_of(given, walk.s, walk.b, walk.head, query);
    shared.delta[stage][threadIdx.x] = delta_of(given, walk.s, walk.b, walk.head, query);
  }
}

// A warpgroup's piece of dQ to memory. Deterministic: a thread waits for the block's turn, the others for it.
template <class W>
PTX_INLINE void add_piece(const float (&dq)[piece / warpgroup], float* to, const Given& given, const W& walk,
                          int group) {
  const int thread = threadIdx.x % warpgroup;
  if (given.turns) {
    if (thread == 0) walk.wait_for_turn(given, 2);
    ptx::named_barrier_sync(1 + group, warpgroup);
  }
#pragma unroll
  for (int i = 0; i < piece / warpgroup; ++i) ptx::red_add(to + thread + i * warpgroup, dq[i]);
  if (given.turns) {
    ptx::named_barrier_sync(1 + group, warpgroup);
    if (thread == 0) {
      __threadfence();  // of all sums: the barrier has brought them here
      atomicAdd(walk.turn(given), 1u);
    }
  }
}

template <class S>
__global__ void __launch_bounds__(S::threads, 1)
    wgmma(const __grid_constant__ CUtensorMap map_q, const __grid_constant__ CUtensorMap map_k,
          const __grid_constant__ CUtensorMap map_v, const __grid_constant__ CUtensorMap map_do,
          const __grid_constant__ Given given, const Rows<typename S::T> out_dk, const Rows<typename S::T> out_dv) {
  using T = typename S::T;
  constexpr int head_dim = S::head_dim, keys = S::keys, queries = S::queries;
  auto& shared = simt::dynamic_shared<typename S::Shared>();
  auto walk = Walk<keys, queries>::of_block(given);
  if (walk.first_key >= walk.s.keys) return;
  const int group = ptx::uniform(threadIdx.x / warpgroup), own = 64 * group;  // its first key in the tile
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(&shared.full_kv, 1);
    for (int i = 0; i < S::stages; ++i) ptx::mbarrier_init(&shared.full[i], 1);
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  if (walk.steps > 0) {
    if (threadIdx.x == 0) {
      uint64_t* const full = &shared.full_kv;
      const int batch = walk.batch(given);
      ptx::mbarrier_arrive_expect_tx(full, 2 * tile_bytes(keys, head_dim));
      hopper::load_tile<keys, head_dim>(shared.k, &map_k, full, walk.key_row(), walk.kv_head, batch);
      hopper::load_tile<keys, head_dim>(shared.v, &map_v, full, walk.key_row(), walk.kv_head, batch);
    }
    load_step<S>(shared, &map_q, &map_do, given, walk, 0);
    ptx::mbarrier_wait(&shared.full_kv, 0);
  }

  float dk[head_dim / 2] = {}, dv[head_dim / 2] = {};
  Cursor<S::stages> cursor;
#pragma unroll 1
  for (int step = 0; step < walk.steps; ++step) {
    const int stage = cursor.stage;
    __syncthreads();  // nobody reads the other stage any more; lse and delta are there
    auto next = walk;
    next.advance();
    if (step + 1 < walk.steps) load_step<S>(shared, &map_q, &map_do, given, next, 1 - stage);

    float x[queries / 2], dp[queries / 2];
    uint32_t p[queries / 16][4], ds[queries / 16][4];
    ptx::mbarrier_wait(&shared.full[stage], cursor.parity);
    ptx::wgmma_fence();
    hopper::multiply_along_head<queries, keys, queries, head_dim>(x, shared.k, own, shared.q[stage], 0);
    ptx::wgmma_fence();
    hopper::multiply_along_head<queries, keys, queries, head_dim>(dp, shared.v, own, shared.d_o[stage], 0);
    ptx::wgmma_commit_group();
    ptx::wgmma_wait_group<0>();
    const Scores<T, queries> scores{given,     walk.s, walk.b, walk.head, walk.first_key + own, walk.first_query(),
                                    shared.lse[stage], shared.delta[stage]};
    scores.both(x, dp, p, [&](int j, const auto& four) {
#pragma unroll
      for (int i = 0; i < 4; ++i) ds[j][i] = four[i];
      store_operand<keys>(shared.ds[stage], four, own, j);
    });
    ptx::fence_proxy_async();
    ptx::wgmma_fence();
    hopper::multiply_along_rows<queries, queries, head_dim>(dv, p, shared.d_o[stage], 0);
    hopper::multiply_along_rows<queries, queries, head_dim>(dk, ds, shared.q[stage], 0);
    ptx::wgmma_commit_group();
    __syncthreads();  // both have stored their keys of ds
    float dq[piece / warpgroup];
    const int box = queries == 128 ? 0 : group;
    ptx::wgmma_fence();
    multiply_along_keys<T, keys>(dq, shared.ds[stage] + (group - box) * keys * 64, shared.k + box * keys * 64);
    ptx::wgmma_commit_group();
    ptx::wgmma_wait_group<0>();
    add_piece(dq, walk.dq_tile(given, head_dim) + group * piece, given, walk, group);
    walk = next;
    cursor.advance();
  }

#pragma unroll
  for (int i = 0; i < head_dim / 2; ++i) dk[i] *= given.rules.scale;
  const int row = walk.key_row() + own, left = walk.s.keys - walk.first_key - own;
  hopper::store_rows<head_dim>(dk, out_dk.at(walk.b, row, walk.kv_head), out_dk.row, left);
  hopper::store_rows<head_dim>(dv, out_dv.at(walk.b, row, walk.kv_head), out_dv.row, left);
}

}  // namespace

void wgmma_03(const Backward& b) {
  if (b.forward.type != DataType::bf16) refuse("the element type of q: this step takes bfloat16");
  if (b.forward.head_dim == 64) run<Wgmma03<64>>(b, wgmma<Wgmma03<64>>);
  else if (b.forward.head_dim == 128) run<Wgmma03<128>>(b, wgmma<Wgmma03<128>>);
  else refuse("head_dim " + std::to_string(b.forward.head_dim) + ": this step takes 64 or 128");
}

}  // namespace attention::backward
