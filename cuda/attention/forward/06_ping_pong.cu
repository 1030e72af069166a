// Step 06: the two consumers take turns. In step 05 both could be in the softmax together, and then both in the queue
// for the tensor cores. A turn is all that a consumer has to multiply between two softmaxes: the output of the tile
// before, p v, and the scores of the next. It is passed on as soon as it is issued:
//   consumer 0   | p v, q k' | softmax   | p v, q k' | softmax   |
//   consumer 1   | softmax   | p v, q k' | softmax   | p v, q k' |
// The tensor cores work for one while the other one exponentiates. At head width 128 a tile of 128 x 128 has twice as
// many clocks of products as of exponentials, and the softmax hides if both keep pace; at 64 it has as many, and every
// delay shows. What is left: a consumer waits for both of its products although the softmax needs only one. Takes bf16,
// head widths 64 and 128.
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
  at.advance();

#pragma unroll 1
  for (int i = 1; i < tile.count; ++i, at.advance(), before.advance()) {
    ptx::mbarrier_wait(&shared.full_k[at.stage], at.parity);
    ptx::mbarrier_wait(&shared.full_v[before.stage], before.parity);
    take_turn(consumer);
    ptx::wgmma_fence();
    issue_output<S>(o, p, shared, before.stage);
    issue_scores<S>(s, shared, consumer, at.stage);
    if (consumer == 0 || i + 1 < tile.count) give_turn(consumer);
    ptx::wgmma_wait_group<0>();
    release(&shared.empty_k[at.stage]);
    release(&shared.empty_v[before.stage]);

    softmax_step<S::keys>(s, softmax, factor, rules, tile, query, step_key<S::keys>(tile, i));
    multiply_rows<S::head_dim>(o, factor);
    to_operand<T, S::keys>(s, p);
  }
  ptx::mbarrier_wait(&shared.full_v[before.stage], before.parity);
  ptx::wgmma_fence();
  issue_output<S>(o, p, shared, before.stage);
  ptx::wgmma_wait_group<0>();
  finish<S::head_dim>(o, softmax, rules, output, tile, query);
}

template <class S>
__global__ void __launch_bounds__(S::threads, 1)
    ping_pong(const __grid_constant__ CUtensorMap map_q, const __grid_constant__ CUtensorMap map_k,
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

void ping_pong_06(const Problem& p) {
  for_head_dim(p, [&](auto head_dim) { launch<Shape<head_dim>>(ping_pong<Shape<head_dim>>, p); });
}

}  // namespace attention::forward
