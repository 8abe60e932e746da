// Names of exported functions. A file that is compiled once for each instruction set names them with KERNEL:
//
//     void KERNEL(norm)(...)        // mdi_avx2_norm when MDI_ISA is avx2
//
// SCALAR(norm) is the same function of the scalar instruction set, the reference of self-tests.
#ifndef MDI_KERNEL_H
#define MDI_KERNEL_H

#define MDI_JOIN_EXPANDED(isa, name) mdi_##isa##_##name
#define MDI_JOIN(isa, name) MDI_JOIN_EXPANDED(isa, name)
#define KERNEL(name) MDI_JOIN(MDI_ISA, name)
#define SCALAR(name) MDI_JOIN(scalar, name)

#endif
