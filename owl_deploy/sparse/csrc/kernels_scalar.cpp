#include "isa_scalar.h"
#include "product.h"

namespace owl {

extern const Kernels kScalarKernels;
const Kernels kScalarKernels = {Scalar::kName, Scalar::kManyTokens, run_stage<Scalar>};

}  // namespace owl
