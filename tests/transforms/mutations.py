"""What the tests of this wing must notice."""

from tests.mutation import Mutation

COMPILED = "tests/transforms/test_compiled.py"
LIFTING = "tests/transforms/test_lifting.py"
ONE_OP = "tests/transforms/test_one_op.py"
PAIRS = "tests/algebra/test_pairs.py"

MUTATIONS: dict[str, Mutation] = {
    "a Function hides its second derivative": Mutation(
        "transforms/one_op.py",
        "_is_torchs_own",
        'hasattr(node, "_forward_cls") or "Graph" in node.name() or "ToCopy" in node.name()',
        'False or "Graph" in node.name() or "ToCopy" in node.name()',
        (ONE_OP,),
    ),
    "what a container holds may be another number": Mutation(
        "transforms/reading.py",
        "_same",
        "constant is value or (type(constant) is type(value) and bool(constant == value))",
        "True",
        (COMPILED,),
    ),
    "what a container holds may be another tensor": Mutation(
        "transforms/reading.py", "_same", "known is value and (not made)", "not made", (COMPILED,)
    ),
    "a backward that is not linear": Mutation(
        "transforms/one_op.py", "OneOp.run", "due(sizes not in self.verified) and len(losses)", "False", (ONE_OP,)
    ),
    "a zero times NaN": Mutation(
        "transforms/one_op.py",
        "_fill",
        "bool(row.isfinite().all())",
        "True",
        (ONE_OP,),
    ),
    "factors of other sizes are trusted": Mutation(
        "transforms/steps.py",
        "Transform.attempt",
        "self.due(not checked.factored.knows(outcome.sizes))",
        "self.due(not checked.factored)",
        (PAIRS, "-k", "verified_once"),
    ),
    "what the losses read is not guarded": Mutation(
        "transforms/reading.py",
        "_guarded",
        'local["losses"].call_function(tx, [local["params"], local["batch"]], {})',
        "None",
        (COMPILED, "-k", "vmapped_loss or mode_of"),
    ),
    "one graph for all steps": Mutation(
        "transforms/compiling.py",
        "with_code_of_its_own",
        "function.__code__.replace(co_name=f'{function.__name__}_{next(_numbers)}')",
        "function.__code__",
        (COMPILED, "-k", "graphs_of_its_own"),
    ),
    "numbers of another call": Mutation(
        "transforms/reading.py",
        "read_losses",
        "not step.prepare(*whole)",
        "False",
        (COMPILED, "-k", "name_the_rows or one_size"),
    ),
    "directions and members swapped": Mutation(
        "transforms/lifting.py",
        "Scores.vmap",
        "found.unflatten(1, (info.batch_size, k)), 1",
        "found.unflatten(1, (k, info.batch_size)).mT, 1",
        (LIFTING, "-k", "directions"),
    ),
    "other draws for a derivative": Mutation(
        "transforms/lifting.py",
        "BelowGrad.pulled",
        "replaying(self.drawn)",
        "torch.set_grad_enabled(torch.is_grad_enabled())",
        (LIFTING, "-k", "dropout"),
    ),
    "derivatives of unweighted losses": Mutation(
        "transforms/lifting.py",
        "BelowGrad.pulled",
        "column = column.to(losses.dtype)",
        "column = torch.ones_like(losses)",
        (LIFTING, "-k", "transforms"),
    ),
}
