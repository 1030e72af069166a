// Step 05: the order in which things are issued. In step 04 a warpgroup issues products, waits, computes, issues,
// waits: while it computes, only the other one's products run, and the barrier for ds makes both compute at the same
// time. Here something is always being multiplied:
//
//   dP(i)              while the exponentials of S(i) are taken
//   dV(i)              while ds is computed, and until both warpgroups have stored theirs
//   dK(i), S(i + 1)    while dQ(i), which was issued before them, goes to shared memory
//
// x, dp, dk and dv alone are 192 of 240 registers, so p, too, goes through shared memory: as operands from there, p and
// ds take none while they are multiplied. For head widths up to 128: a block has 128 keys, of which a warpgroup owns
// 64, and 64 queries a step, or 128 where the head is 64 wide. All element types and rules.
#pragma once
#include "attention/backward/hopper_roles.cuh"

namespace attention::backward::best {

template <class T_, int head_dim_, int queries_>
struct Shape {
  using T = T_;
  static constexpr int head_dim = head_dim_, queries = queries_, groups = 2, keys = 64 * groups, pieces = 1;
  static constexpr int threads = (groups + 1) * warpgroup, stages_q = 2, stages_do = 2;
  static_assert(queries == 128 ? head_dim == 64 : queries == 64 && boxes_of(head_dim) == 2,
                "a piece of dq for each group");

  struct Shared : Stages<Shape> {
    alignas(1024) T p[keys * queries];      // a warpgroup writes and reads its own rows
    alignas(1024) T ds[2][keys * queries];  // in turn: the other warpgroup may still multiply the one before
  };
  static_assert(sizeof(Shared) <= 227 * 1024, "shared memory of a block");
};

template <class S>
__global__ void __launch_bounds__(S::threads, 1)
    best(const __grid_constant__ CUtensorMap map_q, const __grid_constant__ CUtensorMap map_k,
         const __grid_constant__ CUtensorMap map_v, const __grid_constant__ CUtensorMap map_do,
         const __grid_constant__ Given given, const Rows<typename S::T> out_dk, const Rows<typename S::T> out_dv) {
  using T = typename S::T;
  constexpr int head_dim = S::head_dim, keys = S::keys, queries = S::queries;
  auto& shared = simt::dynamic_shared<typename S::Shared>();
  auto walk = Walk<keys, queries>::of_block(given);
  if (walk.first_key >= walk.s.keys) return;
  set_up<S>(shared);
  const int role = ptx::uniform(threadIdx.x / warpgroup);
  if (role == 0) {
    ptx::setmaxnreg_dec<24>();
    serve<S>(shared, &map_q, &map_k, &map_v, &map_do, given, walk);
    return;
  }
  ptx::setmaxnreg_inc<240>();
  const int group = role - 1, own = 64 * group;  // its first key in the tile
  const int box = queries == 128 ? 0 : group;    // of the head's columns, for dq
  float dk[head_dim / 2] = {}, dv[head_dim / 2] = {}, dq[piece / warpgroup];
  float x[queries / 2];
  const auto start_scores = [&](unsigned step) {  // a step's stage and parity, of both rings, are bits of its number
    ptx::mbarrier_wait(&shared.full_q[step % 2], step / 2 % 2);
    ptx::wgmma_fence();
    hopper::multiply_along_head<queries, keys, queries, head_dim>(x, shared.k, own, shared.q[step % 2], 0);
    ptx::wgmma_commit_group();
  };
  if (walk.steps > 0) {
    ptx::mbarrier_wait(&shared.full_k, 0);
    start_scores(0);
    ptx::mbarrier_wait(&shared.full_v, 0);
    ptx::wgmma_wait_group<0>();
  }
#pragma unroll 1
  for (unsigned step = 0; step < unsigned(walk.steps); ++step, walk.advance()) {
    const int stage = step % 2;
    float dp[queries / 2];
    ptx::mbarrier_wait(&shared.full_do[stage], step / 2 % 2);
    ptx::wgmma_fence();
    hopper::multiply_along_head<queries, keys, queries, head_dim>(dp, shared.v, own, shared.d_o[stage], 0);
    ptx::wgmma_commit_group();
    const Scores<T, queries> scores{given,     walk.s, walk.b, walk.head, walk.first_key + own, walk.first_query(),
                                    shared.lse[stage], shared.delta[stage]};
    ptx::named_barrier_sync(2 + group, warpgroup);  // for all four warps dV of the step before has read p
    scores.probabilities(x, [&](int j, const auto& p) { store_operand<keys>(shared.p, p, own, j); });
    ptx::fence_proxy_async();
    ptx::named_barrier_sync(2 + group, warpgroup);
    ptx::wgmma_fence();
    multiply_along_rows<queries, keys, head_dim>(dv, shared.p, own, shared.d_o[stage]);
    ptx::wgmma_commit_group();
    ptx::wgmma_wait_group<1>();  // dP
    scores.differentiate(x, dp, [&](int j, const auto& ds) { store_operand<keys>(shared.ds[stage], ds, own, j); });
    ptx::fence_proxy_async();
    ptx::named_barrier_sync(1, S::groups * warpgroup);  // both have stored their keys of ds
    ptx::wgmma_fence();
    multiply_along_keys<T, keys>(dq, shared.ds[stage] + (group - box) * keys * 64, shared.k + box * keys * 64);
    ptx::wgmma_commit_group();
    multiply_along_rows<queries, keys, head_dim>(dk, shared.ds[stage], own, shared.q[stage]);
    ptx::wgmma_commit_group();
    start_scores(min(step + 1, walk.steps - 1u));  // after the last step once more the same: no branch among wgmmas
    ptx::wgmma_wait_group<2>();  // dV and dQ
    release(&shared.empty_do[stage]);
    hand_over<S>(shared, dq, group, step % 2);
    ptx::wgmma_wait_group<0>();
    release(&shared.empty_q[stage]);
  }

#pragma unroll
  for (int i = 0; i < head_dim / 2; ++i) dk[i] *= given.rules.scale;
  const int row = walk.key_row() + own, left = walk.s.keys - walk.first_key - own;
  hopper::store_rows<head_dim>(dk, out_dk.at(walk.b, row, walk.kv_head), out_dk.row, left);
  hopper::store_rows<head_dim>(dv, out_dv.at(walk.b, row, walk.kv_head), out_dv.row, left);
}

// In files of their own: they are compiled apart.
template <class T>
void run_64(const Backward&);
template <class T>
void run_96(const Backward&);
template <class T>
void run_128(const Backward&);
template <class T>
void run_192(const Backward&);
template <class T>
void run_256(const Backward&);

}  // namespace attention::backward::best
