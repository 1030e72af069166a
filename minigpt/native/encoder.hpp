// Encoding: each pre-token is looked up in a cache of earlier ones, else merged by rank, lowest first and among equals
// leftmost first. Rules come in two kinds, as in minigpt/bpe.py: listed merges, or "any two tokens whose
// concatenation is a token", which is reduced to one merge a token where that is the same.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <functional>
#include <memory>
#include <mutex>
#include <queue>
#include <string_view>
#include <thread>
#include <vector>

#include "maps.hpp"
#include "splitter.hpp"

namespace bpe {

class Encoder {
 public:
  using Triple = std::array<uint32_t, 3>;  // left id, right id, id of the product

  // `merges` in order of rank; nullptr takes the rule by concatenation, where the rank of a merge is its product's id.
  // `whole`: a pre-token that is a token is that token, whatever the merges would make of it.
  Encoder(const std::vector<std::string_view>& tokens, const std::vector<uint32_t>& ids,
          const std::vector<Triple>* merges, bool whole, Splitter splitter)
      : splitter_(std::move(splitter)), whole_(whole || !merges), ids_(ids) {
    for (const auto& token : tokens) vocabulary_.find_or_insert(token.data(), token.size());
    for (size_t i = 0; i < tokens.size(); ++i) {
      if (tokens[i].size() == 1) byte_ids_[static_cast<uint8_t>(tokens[i][0])] = ids[i];
    }
    if (merges) {
      for (uint32_t rank = 0; rank < merges->size(); ++rank) {
        const auto& [left, right, product] = (*merges)[rank];
        pairs_.find_or_insert(left, right, {rank, product});
      }
    } else {
      by_concatenation();
      reduce();
    }
  }

  const std::vector<Triple>& reduced() const { return reduced_; }
  const Splitter& splitter() const { return splitter_; }

  // Pre-tokens of the text, or those that end at `ends`, appended to `out` as ids.
  void encode(std::string_view text, const std::vector<uint64_t>* ends, std::vector<uint32_t>& out) {
    std::unique_ptr<Scratch> scratch = borrow();
    out.reserve(out.size() + text.size() / 3 + 16);
    const char *begin = text.data(), *end = begin + text.size();
    if (ends) {
      const char* p = begin;
      for (const uint64_t stop : *ends) {
        piece(p, begin + stop - p, *scratch, out);
        p = begin + stop;
      }
    } else {
      for (const char *p = begin, *q; p < end; p = q) {
        q = splitter_.next(p, end);
        piece(p, q - p, *scratch, out);
      }
    }
    give_back(std::move(scratch));
  }

  std::vector<std::vector<uint32_t>> encode_batch(const std::vector<std::string_view>& texts, size_t threads) {
    std::vector<std::vector<uint32_t>> out(texts.size());
    std::atomic<size_t> next{0};
    const auto work = [&] {
      for (size_t i; (i = next++) < texts.size();) encode(texts[i], nullptr, out[i]);
    };
    std::vector<std::thread> others;
    for (size_t t = 1; t < std::min(threads, texts.size()); ++t) others.emplace_back(work);
    work();
    for (auto& thread : others) thread.join();
    return out;
  }

 private:
  static constexpr uint32_t NONE = UINT32_MAX;
  static constexpr size_t LONGEST_CACHED = 64, MOST_CACHED = 1 << 18, LONG_PIECE = 128;

  struct Merge {
    uint32_t rank = NONE, id = NONE;
  };
  struct Scratch {  // what one thread works with; kept between calls, so the cache stays warm
    ByteMap cached;
    std::vector<std::pair<uint32_t, uint32_t>> spans;  // of each cached pre-token: where in cached_ids, how many
    std::vector<uint32_t> cached_ids;
    std::vector<uint32_t> ids;
    std::vector<Merge> merges;  // [i]: what ids[i], ids[i + 1] merge to
  };

  std::unique_ptr<Scratch> borrow() {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (idle_.empty()) return std::make_unique<Scratch>();
    auto scratch = std::move(idle_.back());
    idle_.pop_back();
    return scratch;
  }

  void give_back(std::unique_ptr<Scratch> scratch) {
    const std::lock_guard<std::mutex> lock(mutex_);
    idle_.push_back(std::move(scratch));
  }

  void piece(const char* p, size_t n, Scratch& scratch, std::vector<uint32_t>& out) const {
    if (n == 1) return out.push_back(byte_ids_[static_cast<uint8_t>(*p)]);
    if (n > LONGEST_CACHED) {
      merge(p, n, NONE, scratch);
      out.insert(out.end(), scratch.ids.begin(), scratch.ids.end());
      return;
    }
    if (scratch.cached.size() >= MOST_CACHED) {
      scratch.cached.clear();
      scratch.spans.clear();
      scratch.cached_ids.clear();
    }
    const uint32_t number = scratch.cached.find_or_insert(p, n);
    if (number == scratch.spans.size()) {
      merge(p, n, NONE, scratch);
      scratch.spans.emplace_back(scratch.cached_ids.size(), scratch.ids.size());
      scratch.cached_ids.insert(scratch.cached_ids.end(), scratch.ids.begin(), scratch.ids.end());
    }
    const auto [first, count] = scratch.spans[number];
    const uint32_t* ids = scratch.cached_ids.data() + first;
    for (uint32_t i = 0; i < count; ++i) out.push_back(ids[i]);
  }

  Merge lookup(uint32_t left, uint32_t right, uint32_t limit) const {
    const Merge* merge = pairs_.find(left, right);
    return merge && merge->rank < limit ? *merge : Merge{};
  }

  // The ids of one pre-token, into scratch.ids; only merges of a rank below `limit` are made.
  void merge(const char* p, size_t n, uint32_t limit, Scratch& scratch) const {
    auto& ids = scratch.ids;
    ids.clear();
    if (whole_ && limit == NONE) {
      const uint32_t token = vocabulary_.find(p, n);
      if (token != ByteMap::NONE) return ids.push_back(ids_[token]);
    }
    for (size_t i = 0; i < n; ++i) ids.push_back(byte_ids_[static_cast<uint8_t>(p[i])]);
    if (n > LONG_PIECE) return merge_long(limit, ids);
    auto& merges = scratch.merges;
    merges.clear();
    for (size_t i = 0; i + 1 < n; ++i) merges.push_back(lookup(ids[i], ids[i + 1], limit));
    while (!merges.empty()) {  // quadratic, but on a handful of symbols nothing is quicker than looking at all
      size_t best = 0;
      for (size_t i = 1; i < merges.size(); ++i) best = merges[i].rank < merges[best].rank ? i : best;
      if (merges[best].rank == NONE) return;
      ids[best] = merges[best].id;
      ids.erase(ids.begin() + best + 1);
      merges.erase(merges.begin() + best);
      if (best > 0) merges[best - 1] = lookup(ids[best - 1], ids[best], limit);
      if (best < merges.size()) merges[best] = lookup(ids[best], ids[best + 1], limit);
    }
  }

  // The same with a heap of candidates over a linked list: n log n, for pre-tokens of any length.
  void merge_long(uint32_t limit, std::vector<uint32_t>& ids) const {
    const size_t n = ids.size();
    struct Candidate {
      uint32_t rank;
      size_t at;
      uint32_t left, right, id;
      bool operator>(const Candidate& other) const { return std::pair(rank, at) > std::pair(other.rank, other.at); }
    };
    std::priority_queue<Candidate, std::vector<Candidate>, std::greater<>> queue;
    std::vector<size_t> before(n), after(n);
    const auto push = [&](size_t i) {
      if (i >= n || after[i] >= n) return;
      const Merge merge = lookup(ids[i], ids[after[i]], limit);
      if (merge.rank != NONE) queue.push({merge.rank, i, ids[i], ids[after[i]], merge.id});
    };
    for (size_t i = 0; i < n; ++i) {
      before[i] = i - 1;  // of the first: SIZE_MAX
      after[i] = i + 1;
    }
    for (size_t i = 0; i < n; ++i) push(i);
    while (!queue.empty()) {
      const Candidate best = queue.top();
      queue.pop();
      const size_t i = best.at, next = after[i];
      if (next >= n || ids[i] != best.left || ids[next] != best.right) continue;  // out of date
      ids[i] = best.id;
      ids[next] = NONE;
      after[i] = after[next];
      if (after[i] < n) before[after[i]] = i;
      push(before[i]);
      push(i);
    }
    ids.erase(std::remove(ids.begin(), ids.end(), NONE), ids.end());
  }

  // Every way to put a token together from two tokens; its rank is the token's id.
  void by_concatenation() {
    for (uint32_t t = 0; t < vocabulary_.size(); ++t) {
      const std::string_view token = vocabulary_[t];
      for (size_t cut = 1; cut < token.size(); ++cut) {
        const uint32_t left = vocabulary_.find(token.data(), cut);
        const uint32_t right = left == NONE ? NONE : vocabulary_.find(token.data() + cut, token.size() - cut);
        if (right != NONE) pairs_.find_or_insert(ids_[left], ids_[right], {ids_[t], ids_[t]});
      }
    }
  }

  // One merge a token, in order of rank, if the merges of lower rank leave each token's bytes as exactly two tokens.
  // Then the table need hold no others: minigpt.bpe.canonical_merges says why.
  void reduce() {
    std::vector<uint32_t> order;
    for (uint32_t t = 0; t < vocabulary_.size(); ++t) {
      if (vocabulary_[t].size() > 1) order.push_back(t);
    }
    std::sort(order.begin(), order.end(), [&](uint32_t a, uint32_t b) { return ids_[a] < ids_[b]; });
    Scratch scratch;
    for (const uint32_t t : order) {
      merge(vocabulary_[t].data(), vocabulary_[t].size(), ids_[t], scratch);
      if (scratch.ids.size() != 2) return reduced_.clear();
      reduced_.push_back({scratch.ids[0], scratch.ids[1], ids_[t]});
    }
    pairs_ = {};
    for (const auto& [left, right, product] : reduced_) pairs_.find_or_insert(left, right, {product, product});
  }

  Splitter splitter_;
  bool whole_;
  std::vector<uint32_t> ids_;  // of the tokens, which the vocabulary numbers as they came
  ByteMap vocabulary_;
  std::array<uint32_t, 256> byte_ids_{};
  PairMap<Merge> pairs_;
  std::vector<Triple> reduced_;
  std::mutex mutex_;
  std::vector<std::unique_ptr<Scratch>> idle_;
};

}  // namespace bpe
