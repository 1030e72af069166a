// Step 05: a thread that only loads, two warpgroups that only compute. In step 04 nothing was on its way from memory
// while a block multiplied, and every 64 queries fetched all of K and V. Now a producer runs ahead through rings of
// stages:
//   full_k[i], full_v[i]     one arrival and the bytes of a tile: consumers may multiply it
//   empty_k[i], empty_v[i]   one arrival of each consumer: the producer may fill the stage again
// and 128 queries share what it loads. setmaxnreg gives the producer's registers to the consumers, who hold 64 scores,
// up to 64 sums of the output and 32 registers of probabilities each; it works on whole warpgroups, so the producer is
// one.
//
// What is left: a consumer's scores, softmax and output come strictly after each other, and nothing keeps the two
// consumers from being in the softmax at the same time, with idle tensor cores. Takes bf16, head widths 64 and 128.
#include "attention/forward/hopper_forward.cuh"

namespace attention::forward {
namespace {

using namespace ladder;

template <class S>
PTX_INLINE void consume(typename S::Shared& shared, const Rules& rules, const Output& output, const Tile& tile,
                        int consumer) {
  const int query = tile.query + 64 * consumer;
  float o[S::head_dim / 2] = {};
  Softmax softmax;
  if (tile.count > 0) ptx::mbarrier_wait(&shared.full_q, 0);
  typename S::Cursor at;
#pragma unroll 1
  for (int i = 0; i < tile.count; ++i, at.advance()) {
    float s[S::keys / 2], factor[2];
    ptx::mbarrier_wait(&shared.full_k[at.stage], at.parity);
    ptx::wgmma_fence();
    issue_scores<S>(s, shared, consumer, at.stage);
    ptx::wgmma_wait_group<0>();
    release(&shared.empty_k[at.stage]);

    softmax_step<S::keys>(s, softmax, factor, rules, tile, query, step_key<S::keys>(tile, i));
    multiply_rows<S::head_dim>(o, factor);
    uint32_t p[S::keys / 16][4];
    to_operand<T, S::keys>(s, p);
    ptx::mbarrier_wait(&shared.full_v[at.stage], at.parity);
    ptx::wgmma_fence();
    issue_output<S>(o, p, shared, at.stage);
    ptx::wgmma_wait_group<0>();
    release(&shared.empty_v[at.stage]);
  }
  finish<S::head_dim>(o, softmax, rules, output, tile, query);
}

template <class S>
__global__ void __launch_bounds__(S::threads, 1)
    producer(const __grid_constant__ CUtensorMap map_q, const __grid_constant__ CUtensorMap map_k,
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

void producer_05(const Problem& p) {
  for_head_dim(p, [&](auto head_dim) { launch<Shape<head_dim>>(producer<Shape<head_dim>>, p); });
}

}  // namespace attention::forward
