#include "isa_neon.h"
#include "product.h"

namespace owl {

extern const Kernels kNeonKernels;
const Kernels kNeonKernels = {Neon::kName, Neon::kManyTokens, run_stage<Neon>};

}  // namespace owl
