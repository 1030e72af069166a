// The words of a mistake: what, by whom, where in the source; and of a deadlock, who waits where for what.
#include <algorithm>
#include <cstdio>
#include <map>

#include "state.h"

namespace simt::model {

std::string at(Site site) { return std::string(site.file) + ":" + std::to_string(site.line); }

std::string block_name(const Cta& block) {
  return "block (" + std::to_string(block.index.x) + "," + std::to_string(block.index.y) + "," +
         std::to_string(block.index.z) + ")";
}

std::string describe(const Thread& thread) {
  return "thread " + std::to_string(thread.linear) + " (warp " + std::to_string(thread.linear / 32) + ") of " +
         block_name(*thread.cta);
}

std::string where(const void* pointer) {
  char text[64];
  if (const Cta* block = owner(pointer)) {
    snprintf(text, sizeof text, "smem+0x%zx", size_t(static_cast<const char*>(pointer) - block->shared));
    return self() && self()->cta == block ? text : std::string(text) + " of " + block_name(*block);
  }
  snprintf(text, sizeof text, "%p", pointer);
  return text;
}

void fail(const std::string& message, Site site) {
  std::string text = message;
  if (const Thread* thread = self()) text += "\n  by " + describe(*thread) + (site.line ? " at " + at(site) : "");
  throw Error(text);
}

void fail_issued(const std::string& message, Site issued, const Cta& block) {
  throw Error(message + "\n  by the operation issued at " + at(issued) + " in " + block_name(block));
}

namespace {

std::string waiting_for(const Thread& thread) {
  const Cta& block = *thread.cta;
  char text[120];
  switch (thread.waits) {
    case Waits::barrier: {
      const Barrier& barrier = block.barriers[thread.detail];
      const unsigned expected = barrier.expected ? unsigned(barrier.expected) : block.alive;
      return (thread.detail ? "named barrier " + std::to_string(thread.detail) : "__syncthreads") + " (" +
             std::to_string(barrier.arrived) + " of " + std::to_string(expected) + " threads arrived)";
    }
    case Waits::cluster: {
      unsigned living = 0;
      for (const Cta* peer : block.cluster->blocks) living += peer->alive;
      return "cluster barrier (" + std::to_string(block.cluster->arrived) + " of " + std::to_string(living) +
             " threads arrived)";
    }
    case Waits::warp: {
      unsigned missing = unsigned(thread.detail);
      for (const Collective& c : block.warps[thread.linear / 32].open)
        if (c.arrived >> (thread.linear % 32) & 1) missing = c.mask & ~c.arrived;
      snprintf(text, sizeof text, "warp operation, mask 0x%08x, lanes missing 0x%08x", unsigned(thread.detail), missing);
      return text;
    }
    case Waits::mbarrier: {
      const auto* barrier = static_cast<const uint64_t*>(thread.object);
      return "mbarrier wait(parity " + std::to_string(thread.detail) + ") on " + where(barrier) + " [" +
             mbarrier_text(barrier) + "]";
    }
    case Waits::wgmma: return wgmma_wait_text(thread);
    case Waits::registers:
      snprintf(text, sizeof text, "setmaxnreg.inc to %d registers a thread; the block has %d free, %d are needed",
               int(thread.detail), block.free_registers,
               (int(thread.detail) - block.warps[thread.linear / 32].registers) * 32);
      return text;
    case Waits::nothing: break;
  }
  return thread.state == State::polling ? "spins without progress" : "was never run";
}

// "0-31,64": at most eight runs.
std::string runs(const std::vector<unsigned>& numbers) {
  std::string text;
  int shown = 0;
  for (size_t i = 0, j; i < numbers.size(); i = j) {
    for (j = i + 1; j < numbers.size() && numbers[j] == numbers[j - 1] + 1;) ++j;
    if (shown++ == 8) return text + ",... (" + std::to_string(numbers.size()) + " in all)";
    text += (i ? "," : "") + std::to_string(numbers[i]) + (j - i > 1 ? "-" + std::to_string(numbers[j - 1]) : "");
  }
  return text;
}

}  // namespace

void deadlock(Worker& w) {
  current = nullptr;  // nobody did it: `where` names every block
  std::string text = w.polling.empty() ? "deadlock" : "no progress: every thread that can run spins";
  if (!w.polling.empty() && w.gang.blocks.size() == w.gang.clusters[0]->blocks.size())
    text += " (blocks that wait for each other need a launch with co_resident)";
  text += ":";
  for (const auto& block : w.gang.blocks) {
    std::map<std::string, std::vector<unsigned>> groups;
    for (unsigned i = 0; i < block->count; ++i) {
      const Thread& thread = block->threads[i];
      groups[thread.state == State::done ? "exited" : waiting_for(thread) + " at " + at(thread.site)].push_back(i);
    }
    text += "\n  " + block_name(*block) + ":";
    for (const auto& [what, threads] : groups) text += "\n    threads " + runs(threads) + ": " + what;
  }
  throw Error(text);
}

}  // namespace simt::model
