"""Those that `benchmarks.inner_loop` measures side by side, one file each.

Every file has one function, `prepare(case, module, batch)`, written as the library's own users would write it: it
gives a function that computes the meta-gradient, summed over the tasks of `batch`, as one flat tensor in the order of
`module.parameters()`. Whatever can be done once is done in `prepare`, and is not timed.
"""
