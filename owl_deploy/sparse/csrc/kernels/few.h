// Few tokens (decode): a unit's weights go through registers once for up to four tokens.
//
// Stage 0 prepares the inputs as the format's kernel reads them. Stage 1 has an item for each unit. Stage 2 adds up
// the sums of a slice's panels, where it has several.
#pragma once

#include <cstring>

#include "kernels/few_bytes.h"
#include "kernels/few_words.h"
#include "kernels/finish.h"
#include "kernels/kernel.h"

namespace owl {
namespace {

constexpr std::int64_t kSerialSums = 1 << 15;  // partial sums that are not worth another thread
constexpr int kFewTokens = 4;                  // that go through the units together

template <class Isa, class F>
class FewTokens {
 public:
  static constexpr std::size_t kWorkspaceBytes = 0;

  static int stages(const Header&, std::int64_t) { return 3; }

  static std::int64_t items(const Header& h, std::int64_t tokens, int stage) {
    if (stage == 0) return 1;
    if (stage == 1) return std::int64_t{h.slices} * h.panels;
    if (h.panels == 1) return 0;
    return sums_are_serial(h, tokens) ? 1 : std::int64_t{h.slices};
  }

  static std::size_t scratch_bytes(const Header& h, std::int64_t tokens) {
    const std::size_t partials = h.panels == 1 ? 0 : std::size_t{h.rows} * h.panels * sizeof(float);
    return static_cast<std::size_t>(tokens) * (stride(h) + partials);
  }

  static void run(const Product& p, int stage, std::int64_t item, std::byte*) {
    const Header& h = p.weights->header;
    if (stage == 0) {
      for (std::int64_t t = 0; t < p.tokens; ++t) FewKernel<Isa, F>::prepare(h, p.x + t * h.columns, inputs(p, t));
    }
    if (stage == 1) multiply_item(p, item);
    if (stage == 2) {
      const bool serial = sums_are_serial(h, p.tokens);
      const auto first = static_cast<std::uint32_t>(serial ? 0 : item);
      const std::uint32_t end = serial ? h.slices : first + 1;
      for (std::uint32_t slice = first; slice < end; ++slice) add_panels(p, slice);
    }
  }

 private:
  // The scratch: each token's inputs, then partial sums [tokens, slices, panels, rows of the slice].
  static std::size_t stride(const Header& h) { return round_up(FewKernel<Isa, F>::input_bytes(h), kAlignment); }
  static std::byte* inputs(const Product& p, std::int64_t token) {
    return p.scratch + stride(p.weights->header) * static_cast<std::size_t>(token);
  }
  static float* partials(const Product& p, std::int64_t token, std::uint32_t slice) {
    const Header& h = p.weights->header;
    auto* all = reinterpret_cast<float*>(inputs(p, p.tokens));
    return all + token * h.rows * h.panels + std::size_t{slice} * h.slice_rows * h.panels;
  }
  static bool sums_are_serial(const Header& h, std::int64_t tokens) {
    return tokens * h.rows * h.panels <= kSerialSums;
  }

  static void multiply_item(const Product& p, std::int64_t item) {
    const std::int64_t panels = p.weights->header.panels;
    const auto slice = static_cast<std::uint32_t>(item / panels), panel = static_cast<std::uint32_t>(item % panels);
    std::int64_t token = 0;  // the unit stays in the cache while its tokens take turns
    for (; token + kFewTokens <= p.tokens; token += kFewTokens) multiply_unit<kFewTokens>(p, slice, panel, token);
    for (; token + 2 <= p.tokens; token += 2) multiply_unit<2>(p, slice, panel, token);
    for (; token < p.tokens; ++token) multiply_unit<1>(p, slice, panel, token);
  }

  template <int kTokens>
  static void multiply_unit(const Product& p, std::uint32_t slice, std::uint32_t panel, std::int64_t first) {
    const Header& h = p.weights->header;
    std::byte* of_tokens[kTokens];
    for (int t = 0; t < kTokens; ++t) of_tokens[t] = inputs(p, first + t);
    alignas(64) float sums[kTokens][kMaxRows];
    FewKernel<Isa, F>::template multiply<kTokens>(*p.weights, slice, panel, of_tokens, sums);
    for (int t = 0; t < kTokens; ++t) {
      if (h.panels == 1) {
        finish<F>(*p.weights, slice, sums[t], p.y + (first + t) * outputs(h));
      } else {
        const std::uint32_t rows = rows_of(h, slice);
        std::memcpy(partials(p, first + t, slice) + std::size_t{panel} * rows, sums[t], rows * sizeof(float));
      }
    }
  }

  static void add_panels(const Product& p, std::uint32_t slice) {
    const Header& h = p.weights->header;
    const std::uint32_t rows = rows_of(h, slice);
    for (std::int64_t token = 0; token < p.tokens; ++token) {
      const float* from = partials(p, token, slice);
      float sums[kMaxRows];
      std::memcpy(sums, from, rows * sizeof(float));
      for (std::uint32_t panel = 1; panel < h.panels; ++panel) {
        for (std::uint32_t i = 0; i < rows; ++i) sums[i] += from[std::size_t{panel} * rows + i];
      }
      finish<F>(*p.weights, slice, sums, p.y + token * outputs(h));
    }
  }
};

}  // namespace
}  // namespace owl
