"""Training: one recipe a network, shipped configs, and the loop. The command is `inr-kernels train`.

A recipe is a module of this folder with the network's name. It defines

    NETWORK, EXTRAS                 the class; packages that its validation needs, {module: package}
    Options                         a dataclass of `config.Options` with its own options
    check(options)                  raises if they do not fit together
    draw(options, rng)              what all samples of a batch share, such as their shape
    sample(options, drawing, rng, shared)   the tensors of a sample, from a picture
    Objective(options, device)      objective(model, batch, autocast) -> the terms of the loss, by name; its `parts` are
                                    networks that are trained with it
    validate(model, photos, options)    metrics by name
    show(model, batch)              pictures for TensorBoard
    begin(model, start)             optional: takes over the parameters of the checkpoint `start`
    groups(model, options)          optional: the optimizer's groups; `factor` multiplies a group's learning rate
"""
