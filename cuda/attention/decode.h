// Attention of a few new tokens over a cache of keys and values in pages: what a server does for each token it writes.
//
//   q (B, H, T, K)   the T last tokens of each row of the batch, 1 to 16 or so, whose keys are in the cache already
//   cache            pages of `block_size` keys, (pages, block_size, G, K), K contiguous
//   table (B, ..)    the page of keys 0 .. block_size - 1 of a row, of the next ones, and so on; what lies past the
//                    row's length is not read
//   lengths (B)      keys of each row; query t stands at key lengths[b] - T + t and sees it and what is before
//
// The rest is as in attention.h. No CUDA types: the launcher and decode_operation.cpp include this.
#pragma once
#include "attention/attention.h"

namespace attention {

struct Pages {
  const void* data = nullptr;
  int64_t page = 0, slot = 0, head = 0;  // strides in elements, multiples of 8
};

struct Decode {
  int batch, heads, kv_heads, head_dim, queries;
  DataType type;  // of q, the cache and o: bf16 or f16
  Tensor q, o;
  Pages k, v;
  int block_size;  // a multiple of 16
  const int32_t *table, *lengths;
  int64_t table_row;  // stride
  float* lse;         // (B, H, T), contiguous
  float scale, softcap = 0.f;
  int left = everything;
  const float* sink = nullptr;
  // Each row's keys are cut into at most `splits` parts, each of at least `least_keys`, which blocks of their own take.
  int splits = 1, least_keys = 0;
  float* split_o = nullptr;      // workspace for more than one: (splits, B, H, T, K)
  float* split_state = nullptr;  // and (splits, B, H, T, 2)
  void* stream = nullptr;
};

namespace decoding {
void split_kv(const Decode&);  // any GPU from Ampere on
}  // namespace decoding

}  // namespace attention
