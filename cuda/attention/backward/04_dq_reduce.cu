// Step 04: the multiplying warps only multiply. In step 03 they also wait for lse and delta from memory, start copies,
// and add 32 floats a thread to memory by atomics, one instruction each, while nothing is multiplied. Here they write
// dQ to shared memory and go on; a warp sends it away by copies that add, 16 KB each, and another one keeps Q and dO
// coming (see hopper_roles.cuh). Those warps give their registers to the others. There are fewer of them than in step
// 03, so dK takes ds' from shared memory, where it lies for dQ anyway. Otherwise the order is that of step 03.
//
// Head widths 64 and 128 of bf16.
#include "attention/backward/hopper_roles.cuh"

namespace attention::backward {
namespace {

template <int head_dim_>
struct DqReduce04 {
  using T = __nv_bfloat16;
  static constexpr int head_dim = head_dim_, groups = 2, keys = 64 * groups, queries = head_dim == 64 ? 128 : 64;
  static constexpr int pieces = 1, threads = (groups + 1) * warpgroup, stages_q = 2, stages_do = 2;

  struct Shared : Stages<DqReduce04> {
    alignas(1024) T ds[2][keys * queries];  // in turn: the other warpgroup may still read the one before
  };
  static_assert(sizeof(Shared) <= 227 * 1024, "shared memory of a block");
};

template <class S>
__global__ void __launch_bounds__(S::threads, 1)
    dq_reduce(const __grid_constant__ CUtensorMap map_q, const __grid_constant__ CUtensorMap map_k,
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
  float dk[head_dim / 2] = {}, dv[head_dim / 2] = {};
  if (walk.steps > 0) {
    ptx::mbarrier_wait(&shared.full_k, 0);
    ptx::mbarrier_wait(&shared.full_v, 0);
  }
#pragma unroll 1
  for (unsigned step = 0; step < unsigned(walk.steps); ++step, walk.advance()) {
    const int stage = step % 2, parity = step / 2 % 2;
    float x[queries / 2], dp[queries / 2], dq[piece / warpgroup];
    uint32_t p[queries / 16][4];
    ptx::mbarrier_wait(&shared.full_q[stage], parity);
    ptx::wgmma_fence();
    hopper::multiply_along_head<queries, keys, queries, head_dim>(x, shared.k, own, shared.q[stage], 0);
    ptx::mbarrier_wait(&shared.full_do[stage], parity);
    ptx::wgmma_fence();
    hopper::multiply_along_head<queries, keys, queries, head_dim>(dp, shared.v, own, shared.d_o[stage], 0);
    ptx::wgmma_commit_group();
    ptx::wgmma_wait_group<0>();
    const Scores<T, queries> scores{given,     walk.s, walk.b, walk.head, walk.first_key + own, walk.first_query(),
                                    shared.lse[stage], shared.delta[stage]};
    scores.both(x, dp, p, [&](int j, const auto& ds) { store_operand<keys>(shared.ds[stage], ds, own, j); });
    ptx::fence_proxy_async();
    ptx::wgmma_fence();
    hopper::multiply_along_rows<queries, queries, head_dim>(dv, p, shared.d_o[stage], 0);
    ptx::wgmma_commit_group();
    ptx::named_barrier_sync(1, S::groups * warpgroup);  // both have stored their keys of ds
    ptx::wgmma_fence();
    multiply_along_keys<T, keys>(dq, shared.ds[stage] + (group - box) * keys * 64, shared.k + box * keys * 64);
    multiply_along_rows<queries, keys, head_dim>(dk, shared.ds[stage], own, shared.q[stage]);
    ptx::wgmma_commit_group();
    ptx::wgmma_wait_group<0>();
    release(&shared.empty_q[stage]);
    release(&shared.empty_do[stage]);
    hand_over<S>(shared, dq, group, step % 2);
  }

#pragma unroll
  for (int i = 0; i < head_dim / 2; ++i) dk[i] *= given.rules.scale;
  const int row = walk.key_row() + own, left = walk.s.keys - walk.first_key - own;
  hopper::store_rows<head_dim>(dk, out_dk.at(walk.b, row, walk.kv_head), out_dk.row, left);
  hopper::store_rows<head_dim>(dv, out_dv.at(walk.b, row, walk.kv_head), out_dv.row, left);
}

}  // namespace

void dq_reduce_04(const Backward& b) {
  if (b.forward.type != DataType::bf16) refuse("the element type of q: this step takes bfloat16");
  if (b.forward.head_dim == 64) run<DqReduce04<64>>(b, dq_reduce<DqReduce04<64>>);
  else if (b.forward.head_dim == 128) run<DqReduce04<128>>(b, dq_reduce<DqReduce04<128>>);
  else refuse("head_dim " + std::to_string(b.forward.head_dim) + ": this step takes 64 or 128");
}

}  // namespace attention::backward
