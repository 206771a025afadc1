#include "kernels/isa_scalar.h"
#include "kernels/product.h"

namespace owl {

extern const Kernels kScalarKernels;
constexpr Kernels kScalarKernels = kernels_of<Scalar>(Formats{});

}  // namespace owl
