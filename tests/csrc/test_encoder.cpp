// How a batch is cut for an encoder: groups that all threads share, and parts that each thread takes alone.
#include <algorithm>
#include <vector>

#include "encoder.h"
#include "kernels/gemm_kernel.h"
#include "runner.h"

namespace torch_ext::test {
namespace {

EncoderModel model_of(uint32_t hidden_size) {
  EncoderModel model;
  model.header.hidden_size = model.header.embedding_size = hidden_size;
  model.header.intermediate_size = 4 * hidden_size;
  model.header.type = static_cast<uint8_t>(DType::kBF16);
  return model;
}

struct Texts {
  std::vector<int32_t> cu_seqlens{0};
  explicit Texts(const std::vector<int32_t>& lengths) {
    for (const int32_t length : lengths) cu_seqlens.push_back(cu_seqlens.back() + length);
  }
  EncoderBatch batch() const {
    EncoderBatch b;
    b.cu_seqlens = cu_seqlens.data();
    b.sequences = cu_seqlens.size() - 1;
    b.tokens = static_cast<size_t>(cu_seqlens.back());
    return b;
  }
};

size_t tokens_of(const Texts& texts, const SequenceRange& r) {
  return static_cast<size_t>(texts.cu_seqlens[r.last] - texts.cu_seqlens[r.first]);
}

void expect_each_sequence_once(std::vector<SequenceRange> ranges, size_t sequences) {
  std::sort(ranges.begin(), ranges.end(), [](const auto& a, const auto& b) { return a.first < b.first; });
  size_t next = 0;
  for (const SequenceRange& r : ranges) {
    EXPECT(r.first == next && r.last > r.first, "a range from %zu to %zu after %zu", r.first, r.last, next);
    next = r.last;
  }
  EXPECT(next == sequences, "%zu of %zu sequences", next, sequences);
}

TORCH_EXT_TEST(groups_hold_every_sequence_once) {
  const EncoderModel model = model_of(384);
  for (size_t i = 0; i < 200; ++i) {
    std::vector<int32_t> lengths(random_source().between(1, 300));
    for (int32_t& length : lengths) length = static_cast<int32_t>(random_source().below(200));
    const Texts texts(lengths);
    for (const size_t threads : {1, 2, 7}) {
      context("%zu sequences, %zu threads", lengths.size(), threads);
      expect_each_sequence_once(group_sequences(model, texts.batch(), threads), lengths.size());
    }
  }
}

TORCH_EXT_TEST(shares_are_large_and_even) {
  const EncoderModel model = model_of(384);
  size_t shared = 0;
  for (size_t i = 0; i < 300; ++i) {
    std::vector<int32_t> lengths(random_source().between(1, 200));
    for (int32_t& length : lengths) length = static_cast<int32_t>(random_source().between(1, 1 + 20 * (i % 20)));
    const Texts texts(lengths);
    for (const size_t threads : {2, 3, 8}) {
      context("%zu sequences of up to %zu tokens, %zu threads", lengths.size(), 1 + 20 * (i % 20), threads);
      const std::vector<SequenceRange> shares = share_sequences(model, texts.batch(), threads);
      if (shares.empty()) continue;
      ++shared;
      expect_each_sequence_once(shares, lengths.size());
      std::vector<size_t> load(threads, 0);
      for (size_t s = 0; s < shares.size(); ++s) {
        const size_t tokens = tokens_of(texts, shares[s]);
        EXPECT(s == 0 || tokens <= tokens_of(texts, shares[s - 1]), "share %zu is larger than the one before", s);
        // Only one, of what was left at the end, may be smaller.
        EXPECT(tokens >= 128 || s + 1 == shares.size(), "share %zu of %zu has %zu tokens", s, shares.size(), tokens);
        *std::min_element(load.begin(), load.end()) += tokens;
      }
      const size_t longest = *std::max_element(load.begin(), load.end());
      EXPECT(longest * threads * 8 <= texts.batch().tokens * 9, "one thread has %zu of %zu tokens", longest,
             texts.batch().tokens);
    }
  }
  EXPECT(shared > 100, "only %zu batches were shared out", shared);
}

TORCH_EXT_TEST(usual_batches_are_shared_out_evenly) {
  const EncoderModel model = model_of(384);
  for (const size_t threads : {2, 4, 8}) {
    context("%zu threads", threads);
    double excess = 0.0;
    constexpr size_t kBatches = 100;
    for (size_t i = 0; i < kBatches; ++i) {
      std::vector<int32_t> lengths;
      for (size_t left = 512 * threads; left > 0; left -= static_cast<size_t>(lengths.back())) {
        lengths.push_back(static_cast<int32_t>(std::min<size_t>(left, random_source().between(10, 150))));
      }
      const Texts texts(lengths);
      const std::vector<SequenceRange> shares = share_sequences(model, texts.batch(), threads);
      std::vector<size_t> load(threads, 0);
      for (const SequenceRange& r : shares) *std::min_element(load.begin(), load.end()) += tokens_of(texts, r);
      const double longest = static_cast<double>(*std::max_element(load.begin(), load.end()));
      excess += shares.empty() ? 1.0 : longest * static_cast<double>(threads) / texts.batch().tokens - 1.0;
    }
    // Shares of halves of what is left, alone, leave 6 % for two threads and more for others.
    EXPECT(excess / kBatches < 0.045, "the last thread ends %.1f %% after the mean", 100.0 * excess / kBatches);
  }
}

TORCH_EXT_TEST(batches_that_do_not_divide_are_not_shared_out) {
  const EncoderModel model = model_of(384);
  const auto shares = [&](const std::vector<int32_t>& lengths, size_t threads) {
    return share_sequences(model, Texts(lengths).batch(), threads).size();
  };
  EXPECT(shares({512, 512}, 2) == 0, "one text for each thread leaves nothing to even the ends out");
  EXPECT(shares(std::vector<int32_t>(30, 16), 2) == 0, "480 tokens are too few for two threads");
  std::vector<int32_t> lopsided(20, 8);
  lopsided.push_back(512);
  EXPECT(shares(lopsided, 2) == 0, "one text is most of the batch");
  // Two halves where the cache holds one, more where it does not.
  EXPECT(shares(std::vector<int32_t>(32, 58), 2) >= 2, "32 texts of 58 tokens divide well");
}

}  // namespace
}  // namespace torch_ext::test
