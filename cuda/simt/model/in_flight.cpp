// Who is not yet done with a piece of shared memory: copies in flight, and wgmmas that have not been executed. What is
// issued there meanwhile is a mistake, whichever way the race goes.
#include <algorithm>

#include "state.h"

namespace simt::model {

namespace {

// Does the operation still write, or read, this block's shared memory?
bool concerns(const CopyOperation& op, const Cta& block) {
  if (op.kind == CopyOperation::Kind::store) return op.block == &block && !op.read;
  return std::find(op.targets.begin(), op.targets.end(), &block) != op.targets.end();
}

}  // namespace

const char* copy_name(const CopyOperation& op) {
  const bool load = op.kind == CopyOperation::Kind::load;
  return op.tensor ? (load ? "TMA load" : "TMA store") : load ? "bulk load" : "bulk store";
}

std::string copy_in_words(const CopyOperation& op) {
  return std::string("the ") + copy_name(op) + " issued at " + at(op.site) + " by " + describe(*op.issuer);
}

const CopyOperation* load_in_flight(const Cta& block, uint32_t low, uint32_t high) {
  for (const CopyOperation& op : block.gang->async.copies)
    if (op.kind == CopyOperation::Kind::load && concerns(op, block) &&
        overlap(low, high, op.offset, op.offset + op.bytes))
      return &op;
  return nullptr;
}

void check_overwrite(const std::string& what, const Cta& block, uint32_t offset, uint32_t bytes, Site site) {
  const std::string there = (self()->cta == &block ? "" : " of " + block_name(block));
  for (const CopyOperation& op : block.gang->async.copies) {
    if (!overlap(offset, offset + bytes, op.offset, op.offset + op.bytes) || !concerns(op, block)) continue;
    if (op.kind == CopyOperation::Kind::load)
      fail(what + " into " + shared_name(offset) + there + " while " + copy_in_words(op) + " is in flight there", site);
    fail(what + " overwrites " + shared_name(op.offset) + there + ", which " + copy_in_words(op) +
             " still reads (no wait for its bulk group)",
         site);
  }
  const auto& groups = block.async.warpgroups;
  for (size_t g = 0; g < groups.size(); ++g)
    for (uint64_t i = groups[g].done - groups[g].first; i < groups[g].operations.size(); ++i) {
      const WgmmaOperation& op = groups[g].operations[i];
      for (const MatrixOperand* operand : {&op.a, &op.b})
        if (touches(*operand, offset, offset + bytes))
          fail(what + " overwrites " + shared_name(std::max(offset, operand->low)) + there +
                   ", which the wgmma issued at " + at(op.site) + " (warpgroup " + std::to_string(g) +
                   ") may still read",
               site);
    }
}

}  // namespace simt::model
