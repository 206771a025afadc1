#include "isa_avx2.h"
#include "product.h"

namespace owl {

extern const Kernels kAvx2Kernels;
const Kernels kAvx2Kernels = {Avx2::kName, Avx2::kManyTokens, run_stage<Avx2>};

}  // namespace owl
