// owl_selftest [seed [rounds]]: one line for each claim that holds; exits 1 at the first that does not.
#include <algorithm>
#include <cstdlib>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#include "selftest/harness.h"

int main(int count, char** arguments) {
  using namespace owl::selftest;
  seed = count > 1 ? std::strtoull(arguments[1], nullptr, 10) : 1;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_set_death_callback(say_where);
#endif
  const std::int64_t rounds = count > 2 ? std::max(1LL, std::strtoll(arguments[2], nullptr, 10)) : 100;
  // Each with random numbers of its own, so that a change of one leaves the others' cases as they are.
  Random edges(seed * 8), matrices(seed * 8 + 1), any(seed * 8 + 2), refused(seed * 8 + 3);
  Random grid(seed * 8 + 7);
  Random headers(seed * 8 + 4), mutations(seed * 8 + 5), rewritten(seed * 8 + 6);
  check_random_matrices(matrices, rounds);
  check_edges(edges, rounds);
  check_largest_sums(edges);
  check_on_grid(grid, rounds);
  check_any_weights(any, rounds);
  check_refused_weights(refused, rounds);
  check_wrong_headers(headers, rounds);
  check_mutations(mutations, rounds);
  check_rewritten(rewritten, rounds);
}
