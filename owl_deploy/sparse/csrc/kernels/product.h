// The kernels of one instruction set. They are templates over a class of a few operations on 16 lanes (isa_*.h), and
// are compiled in one translation unit for each.
#pragma once

#include <type_traits>

#include "kernels/few.h"
#include "kernels/many.h"

namespace owl {
namespace {

template <class W>
constexpr Way way(std::int64_t from_tokens) {
  return {from_tokens, W::stages, W::items, W::scratch_bytes, W::kWorkspaceBytes, W::run};
}

// By rising number of tokens.
template <class Isa, class F>
constexpr std::array<Way, kWays> kWaysOf = {
    way<FewTokens<Isa, F>>(1),
    way<ManyTokens<Isa, F>>(OfBytes<F> ? Isa::kManyTokensOfBytes : Isa::kManyTokensOfWords),
};
template <class Isa, OfNibbles F>
constexpr std::array<Way, kWays> kWaysOf<Isa, F> = {way<FewTokens<Isa, F>>(1), way<FewTokens<Isa, F>>(1)};


template <class Isa, class... F>
constexpr Kernels kernels_of(FormatList<F...>) {
  return {Isa::kName, {kWaysOf<Isa, F>...}};
}

}  // namespace
}  // namespace owl
