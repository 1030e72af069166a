// Steps 08 and 09: which tile a block takes next. Fixed from the start, so producer and consumers follow it alone:
// block b of n takes the tiles b, b + n, b + 2n, .. in the order below.
#pragma once
#include <algorithm>

#include "attention/rules.cuh"

namespace attention::forward::best {

// A tile of queries of one head, and its tiles of keys: `steps` of them, from number `last` down.
struct Tile {
  Sequence s;
  int batch, head, row, last, steps;
  PTX_INLINE bool exists() const { return row < s.queries; }
};

// Which tile is the index-th. (batch, head) pairs come in groups whose keys and values fit into L2 together, those that
// share a kv head side by side; in a group the last queries of all come first.
struct Schedule {
  int tiles, pairs, group, down;  // all tiles; batch * heads; pairs of a group; tiles of the longest sequence
  Sizes sizes;

  static Schedule of(const Problem& p, int rows) {
    constexpr int64_t cache = 32 << 20;  // of the 50 MB that L2 has
    const int64_t pairs = int64_t(p.batch) * p.heads, down = divide_up(p.queries, rows);
    if (pairs * down > 1 << 30) refuse(std::to_string(pairs * down) + " tiles: expected at most 2^30");
    const int64_t kv_bytes = std::max(int64_t(1), int64_t(p.keys) * p.head_dim * 4);  // of one kv head
    const int64_t together = std::max(int64_t(1), cache / kv_bytes) * (p.heads / p.kv_heads);
    const int64_t groups = (pairs - 1) / together + 1;
    return {int(pairs * down), int(pairs), int((pairs - 1) / groups + 1), int(down), Sizes::of(p)};
  }

  template <int rows, int keys>
  PTX_INLINE Tile tile(const Rules& rules, int index) const {
    const int before = index / (group * down) * group, width = min(group, pairs - before);
    const int place = index - before * down, pair = before + place % width;
    Tile t;
    t.batch = pair / sizes.heads, t.head = pair % sizes.heads;
    t.s = sizes.sequence(t.batch);
    t.row = (down - 1 - place / width) * rows;
    const Range seen = rules.keys_of(t.s, t.row, t.row + rows);
    t.last = (seen.last - 1) / keys;
    t.steps = t.exists() && seen.last > seen.first ? t.last - seen.first / keys + 1 : 0;
    return t;
  }
};

}  // namespace attention::forward::best
