#include "isa_avx512.h"
#include "product.h"

namespace owl {

extern const Kernels kAvx512Kernels;
const Kernels kAvx512Kernels = {Avx512::kName, Avx512::kManyTokens, run_stage<Avx512>};

}  // namespace owl
