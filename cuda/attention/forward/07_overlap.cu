// Step 07: a consumer overlaps with itself. In step 06 it waited for its scores and its output together; but the
// softmax needs only the scores. Now the scores of the next tile are issued first and the output of this one behind
// them:
//   tensor cores    | q k' (j + 1) | p v (j)         |
//   this consumer   |              | softmax (j + 1) | o times factor |
// wgmma_wait_group<1> returns when the scores are there; p v goes on beside the softmax, and only then may the output
// be rescaled and p be overwritten. That takes 64 scores and 32 registers of probabilities beside the output: 240 are
// enough. Turns as in step 06: the other consumer still fills what this one leaves idle.
//
// V is waited for between the softmax and the second wait, although only the next turn needs it: that wait is a loop,
// which ptxas does not move instructions across. In one piece of straight code it moves wgmma_wait_group<0> up, before
// the softmax, and all of the overlap is gone. Takes bf16, head widths 64 and 128.
#include "attention/forward/hopper_forward.cuh"

namespace attention::forward {
namespace {

using namespace ladder;

template <class S>
PTX_INLINE void consume(typename S::Shared& shared, const Rules& rules, const Output& output, const Tile& tile,
                        int consumer) {
  const int query = tile.query + 64 * consumer;
  float o[S::head_dim / 2] = {}, factor[2];
  uint32_t p[S::keys / 16][4];
  Softmax softmax;
  if (tile.count == 0) {
    finish<S::head_dim>(o, softmax, rules, output, tile, query);
    return;
  }
  ptx::mbarrier_wait(&shared.full_q, 0);
  if (consumer == 1) give_turn(consumer);
  typename S::Cursor at, before;  // of the scores; of the output, one tile behind
  float s[S::keys / 2];
  ptx::mbarrier_wait(&shared.full_k[0], 0);
  take_turn(consumer);
  ptx::wgmma_fence();
  issue_scores<S>(s, shared, consumer, 0);
  if (consumer == 0 || tile.count > 1) give_turn(consumer);
  ptx::wgmma_wait_group<0>();
  release(&shared.empty_k[0]);
  softmax_step<S::keys>(s, softmax, factor, rules, tile, query, step_key<S::keys>(tile, 0));  // o is still zero
  to_operand<T, S::keys>(s, p);
  ptx::mbarrier_wait(&shared.full_v[0], 0);
  at.advance();

#pragma unroll 1
  for (int i = 1; i < tile.count; ++i, at.advance(), before.advance()) {
    ptx::mbarrier_wait(&shared.full_k[at.stage], at.parity);
    take_turn(consumer);
    ptx::wgmma_fence();
    issue_scores<S>(s, shared, consumer, at.stage);
    issue_output<S>(o, p, shared, before.stage);
    if (consumer == 0 || i + 1 < tile.count) give_turn(consumer);
    ptx::wgmma_wait_group<1>();
    release(&shared.empty_k[at.stage]);

    softmax_step<S::keys>(s, softmax, factor, rules, tile, query, step_key<S::keys>(tile, i));
    ptx::mbarrier_wait(&shared.full_v[at.stage], at.parity);
    ptx::wgmma_wait_group<0>();
    release(&shared.empty_v[before.stage]);
    multiply_rows<S::head_dim>(o, factor);
    to_operand<T, S::keys>(s, p);
  }
  ptx::wgmma_fence();
  issue_output<S>(o, p, shared, before.stage);
  ptx::wgmma_wait_group<0>();
  finish<S::head_dim>(o, softmax, rules, output, tile, query);
}

template <class S>
__global__ void __launch_bounds__(S::threads, 1)
    overlap(const __grid_constant__ CUtensorMap map_q, const __grid_constant__ CUtensorMap map_k,
            const __grid_constant__ CUtensorMap map_v, Sizes sizes, Rules rules, Output output) {
  auto& shared = simt::dynamic_shared<typename S::Shared>();
  const Tile tile = tile_of_block<S::queries, S::keys>(sizes, rules);
  if (tile.query < 0) return;
  make_barriers<S>(shared);
  const int group = ptx::uniform(threadIdx.x / warpgroup);  // 0 is the producer
  if (group == 0) {
    ptx::setmaxnreg_dec<S::producer_registers>();
    if (threadIdx.x == 0) produce<S>(shared, &map_q, &map_k, &map_v, sizes, tile);
  } else {
    ptx::setmaxnreg_inc<S::consumer_registers>();
    consume<S>(shared, rules, output, tile, group - 1);
  }
}

}  // namespace

void overlap_07(const Problem& p) {
  for_head_dim(p, [&](auto head_dim) { launch<Shape<head_dim>>(overlap<Shape<head_dim>>, p); });
}

}  // namespace attention::forward
