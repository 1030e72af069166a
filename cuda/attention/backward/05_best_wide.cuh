// Step 05 for head widths 192 and 256. 64 keys of dK and dV are 192 or 256 registers a thread there, before anything is
// multiplied. So the warpgroups share the head instead of the keys: each sums one or two boxes of 64 columns of dK and
// dV, for all keys of the block, and of dQ. Of the scores each computes 32 keys, and p and ds go to shared memory,
// where all of them read both. dK and dV are summed turned round, rows = columns of the head: so a block may have 96
// keys.
//
//   192   three warpgroups of 160 registers, 96 keys        256   two of 240, 64 keys
//
// Shared memory holds two stages of Q and one of dO: the next scores are multiplied before dO is free.
#pragma once
#include "attention/backward/05_best.cuh"

namespace attention::backward::best {

template <class T_, int head_dim_, int groups_, int registers_, int registers_of_others_>
struct WideShape {
  using T = T_;
  static constexpr int head_dim = head_dim_, queries = 64, groups = groups_, own_keys = 32, keys = own_keys * groups;
  static constexpr int pieces = boxes_of(head_dim) / groups, threads = (groups + 1) * warpgroup;
  static constexpr int registers = registers_, registers_of_others = registers_of_others_;
  static constexpr int stages_q = 2, stages_do = 1;
  static_assert(stages_do == 1, "what says that p and ds are free");
  static_assert(head_dim == 64 * pieces * groups, "whole boxes");

  struct Shared : Stages<WideShape> {
    alignas(1024) T p[tile_elements(queries, keys)];
    alignas(1024) T ds[tile_elements(queries, keys)];
  };
  static_assert(sizeof(Shared) <= 227 * 1024, "shared memory of a block");
};

// 64 queries x n keys of a warpgroup, rows = queries: products become probabilities times slope, and take(j, p) gets
// the probabilities of keys 16 j .. as an operand. lse: of the lane's two rows.
template <class T, int n, class Take>
PTX_INLINE void probabilities_by_rows(float (&x)[n / 2], const float (&lse)[2], const Given& given, const Sequence& s,
                                      int b, int head, int query, int key, Take take) {
  const float scale_log2 = given.rules.scale * log2_e;
  const bool plain = given.rules.plain(s, query, 64, key, n);
  const int thread = threadIdx.x % warpgroup, lane = thread % 32;
  query += 16 * (thread / 32) + lane / 4, key += lane % 4 * 2;
  const auto each = [&](auto is_plain) {
#pragma unroll
    for (int j = 0; j < n / 16; ++j) {
      uint32_t p[4];
#pragma unroll
      for (int i = 8 * j; i < 8 * j + 8; i += 2) {
        float slope[2] = {1.f, 1.f};
#pragma unroll
        for (int c = i; c < i + 2; ++c) {
          if constexpr (decltype(is_plain)::value) {
            x[c] = ptx::exp2_approx(x[c] * scale_log2 - lse[i / 2 % 2]);
          } else {
            slope[c - i] = given.rules.slope(x[c]);
            const float score = given.rules.score(s, b, head, query + 8 * (i / 2 % 2), key + 8 * (i / 4) + c - i, x[c]);
            x[c] = score == -INFINITY ? 0.f : ptx::exp2_approx(score * scale_log2 - lse[i / 2 % 2]);
          }
        }
        p[i / 2 % 4] = pack<T>(x[i], x[i + 1]);
        x[i] *= slope[0], x[i + 1] *= slope[1];
      }
      take(j, p);
    }
  };
  if (plain) each(std::true_type());
  else each(std::false_type());
}

// d (64 columns of the head x keys) += a' b along 64 queries: a is a box of Q or dO, b is p or ds.
template <int keys, class T>
PTX_INLINE void multiply_along_queries(float (&d)[keys / 2], const T* a, const T* b) {
  const uint64_t left = hopper::mn_major<64>(a), right = hopper::mn_major<64>(b);
#pragma unroll
  for (int i = 0; i < 64 / 16; ++i)
    ptx::wgmma<keys, T, true, true>(d, left + hopper::mn_step(i), right + hopper::mn_step(i), true);
}
// d (64 queries x 64 columns of the head) = ds k, rows of ds = queries.
template <int keys, class T>
PTX_INLINE void multiply_by_keys(float (&d)[piece / warpgroup], const T* ds, const T* k) {
  const uint64_t left = hopper::k_major<64>(ds), right = hopper::mn_major<keys>(k);
#pragma unroll
  for (int i = 0; i < keys / 16; ++i)
    ptx::wgmma<64, T, false, true>(d, left + hopper::k_step<64>(i), right + hopper::mn_step(i), i > 0);
}

// 64 columns of the head x keys, as summed, to rows of dK or dV of which `left` exist. Once a block.
template <int keys, class T>
PTX_INLINE void store_turned(const float (&d)[keys / 2], T* to, int64_t stride, int left) {
  const int thread = threadIdx.x % warpgroup, lane = thread % 32;
  to += 16 * (thread / 32) + lane / 4;
#pragma unroll
  for (int i = 0; i < keys / 2; i += 4) {  // one row's address at a time
    T* at = to + (2 * i + lane % 4 * 2) * stride;
#pragma unroll
    for (int j = 0; j < 2; ++j, at += stride)
      if (2 * i + lane % 4 * 2 + j < left) at[0] = T(d[i + j]), at[8] = T(d[i + j + 2]);
  }
}

template <class S>
__global__ void __launch_bounds__(S::threads, 1)
    best_wide(const __grid_constant__ CUtensorMap map_q, const __grid_constant__ CUtensorMap map_k,
              const __grid_constant__ CUtensorMap map_v, const __grid_constant__ CUtensorMap map_do,
              const __grid_constant__ Given given, const Rows<typename S::T> out_dk, const Rows<typename S::T> out_dv) {
  using T = typename S::T;
  constexpr int head_dim = S::head_dim, keys = S::keys, n = S::own_keys, pieces = S::pieces;
  auto& shared = simt::dynamic_shared<typename S::Shared>();
  auto walk = Walk<keys, S::queries>::of_block(given);
  if (walk.first_key >= walk.s.keys) return;
  set_up<S>(shared);
  const int role = ptx::uniform(threadIdx.x / warpgroup);
  if (role == 0) {
    ptx::setmaxnreg_dec<S::registers_of_others>();
    serve<S>(shared, &map_q, &map_k, &map_v, &map_do, given, walk);
    return;
  }
  ptx::setmaxnreg_inc<S::registers>();
  const int group = role - 1, row = threadIdx.x % warpgroup / 32 * 16 + threadIdx.x % 32 / 4;
  float x[n / 2], dk[pieces][keys / 2] = {}, dv[pieces][keys / 2] = {};
  const auto start_scores = [&](unsigned step) {
    ptx::mbarrier_wait(&shared.full_q[step % 2], step / 2 % 2);
    ptx::wgmma_fence();
    hopper::multiply_along_head<n, 64, keys, head_dim>(x, shared.q[step % 2], 0, shared.k, n * group);
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
    float dp[n / 2], dq[pieces][piece / warpgroup];
    // dO has one stage. That it is full again says that all have multiplied the step before: p and ds are free, too.
    ptx::mbarrier_wait(&shared.full_do[0], step % 2);
    ptx::wgmma_fence();
    hopper::multiply_along_head<n, 64, keys, head_dim>(dp, shared.d_o[0], 0, shared.v, n * group);
    ptx::wgmma_commit_group();
    const float lse[2] = {shared.lse[stage][row], shared.lse[stage][row + 8]};
    const auto take = [&](int j, const auto& p) { store_operand<64>(shared.p, p, 0, group * (n / 16) + j); };
    probabilities_by_rows<T, n>(x, lse, given, walk.s, walk.b, walk.head, walk.first_query(),
                                walk.first_key + n * group, take);
    ptx::wgmma_wait_group<0>();
    const float delta[2] = {shared.delta[0][row], shared.delta[0][row + 8]};
#pragma unroll
    for (int j = 0; j < n / 16; ++j) {
      uint32_t ds[4];
#pragma unroll
      for (int i = 8 * j; i < 8 * j + 8; i += 2)
        ds[i / 2 % 4] = pack<T>(x[i] * (dp[i] - delta[i / 2 % 2]), x[i + 1] * (dp[i + 1] - delta[i / 2 % 2]));
      store_operand<64>(shared.ds, ds, 0, group * (n / 16) + j);
    }
    ptx::fence_proxy_async();
    ptx::named_barrier_sync(1, S::groups * warpgroup);
    ptx::wgmma_fence();
#pragma unroll
    for (int i = 0; i < pieces; ++i)
      multiply_by_keys<keys>(dq[i], shared.ds, shared.k + (group * pieces + i) * keys * 64);
    ptx::wgmma_commit_group();
#pragma unroll
    for (int i = 0; i < pieces; ++i) {
      const int box = (group * pieces + i) * 64 * 64;
      multiply_along_queries<keys>(dv[i], shared.d_o[0] + box, shared.p);
      multiply_along_queries<keys>(dk[i], shared.q[stage] + box, shared.ds);
    }
    ptx::wgmma_commit_group();
    ptx::wgmma_wait_group<1>();  // dQ
#pragma unroll
    for (int i = 0; i < pieces; ++i) hand_over<S>(shared, dq[i], group, (step * pieces + i) % 2);
    start_scores(min(step + 1, walk.steps - 1u));  // after the last step once more the same: no branch among wgmmas
    ptx::wgmma_wait_group<0>();
    release(&shared.empty_q[stage]);
    release(&shared.empty_do[0]);
  }

  const int left = walk.s.keys - walk.first_key;
#pragma unroll
  for (int i = 0; i < pieces; ++i) {
#pragma unroll
    for (int j = 0; j < keys / 2; ++j) dk[i][j] *= given.rules.scale;
    const int column = (group * pieces + i) * 64;
    store_turned<keys>(dk[i], out_dk.at(walk.b, walk.key_row(), walk.kv_head) + column, out_dk.row, left);
    store_turned<keys>(dv[i], out_dv.at(walk.b, walk.key_row(), walk.kv_head) + column, out_dv.row, left);
  }
}

}  // namespace attention::backward::best
