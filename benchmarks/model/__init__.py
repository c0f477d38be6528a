"""A static model of a GPU's multiprocessor: times of the kernels predicted from their machine code, without a GPU."""
