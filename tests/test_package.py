"""What the package is made of: public names, and imports that go one way."""

import ast
import graphlib
import pathlib
import re

import ebm_ppl

PACKAGE = pathlib.Path(ebm_ppl.__file__).parent
DOCS = PACKAGE.parent / "docs"
# Maths at the bottom, hosts at the edge: a wing may import from wings of lower rank.
RANKS = {
    "errors": 0,
    "programs": 1,
    "kernels": 1,
    "smc": 2,
    "energy": 3,
    "exact": 4,
    "model": 5,
    "walkers": 6,
    "training": 6,
    "normalizer": 7,
    "generators": 7,
    "backends": 8,
    "export": 9,
    "__init__": 10,
}
WITHOUT_NUMPYRO = {"errors", "programs", "kernels", "smc", "training", "scores"}
ARVIZ = "export.arviz"


def module_of(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


def imports_of(path):
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module)
    return names


IMPORTS = {module_of(path): imports_of(path) for path in PACKAGE.rglob("*.py")}
WITHIN = {
    module: {name.removeprefix("ebm_ppl.") for name in names if "ebm_ppl." in name}
    for module, names in IMPORTS.items()
}


def wing_of(module):
    return module.split(".")[0]


def users_of(host):
    return {
        module
        for module, names in IMPORTS.items()
        if any(name.split(".")[0] == host for name in names)
    }


def test_every_module_has_a_wing():
    assert {wing_of(module) for module in IMPORTS} == set(RANKS)


def test_wings_import_from_lower_ranks_alone():
    upward = {
        f"{module} imports {name}"
        for module, names in WITHIN.items()
        for name in names
        if wing_of(module) != wing_of(name)
        and RANKS[wing_of(name)] >= RANKS[wing_of(module)]
    }
    assert upward == set()


def test_modules_of_a_wing_stand_in_no_circle():
    order = graphlib.TopologicalSorter(WITHIN)
    assert set(order.static_order()) == set(WITHIN)


def test_hosts_are_known_to_few_modules():
    assert not {
        module
        for module in users_of("numpyro")
        if WITHOUT_NUMPYRO & set(module.split("."))
    }
    assert users_of("arviz") | users_of("xarray") == {ARVIZ}


def test_public_names_are_pinned():
    assert ebm_ppl.__all__ == [
        "MALA",
        "ULA",
        "VERA",
        "ContrastiveDivergence",
        "ContrastiveDivergenceState",
        "EnergyDistribution",
        "Fit",
        "HMCScore",
        "ImportanceScore",
        "Jarzynski",
        "JarzynskiState",
        "LogNormalizer",
        "Monitor",
        "MonteCarloMLE",
        "MonteCarloMLEState",
        "NoiseContrastive",
        "NoiseContrastiveState",
        "NonFiniteError",
        "Polished",
        "Saved",
        "ScoreMatching",
        "ScoreMatchingState",
        "ScoreTest",
        "TabulatedNormalizer",
        "UncertifiedNormalizerError",
        "UnknownNormalizerError",
        "VERAState",
        "Validation",
        "VariationalScore",
        "Walkers",
        "bounded",
        "fitted",
        "from_sklearn",
        "latent_model",
        "load",
        "log_density",
        "log_normalizer",
        "multinomial",
        "normalized",
        "plot_energies",
        "plot_energy_surface",
        "plot_training",
        "polish",
        "residual",
        "sample",
        "save",
        "score_test",
        "standardized_normal",
        "systematic",
        "tabulate_log_normalizer",
        "to_arviz",
    ]
    for name in ebm_ppl.__all__:
        assert getattr(ebm_ppl, name).__doc__


def test_every_public_name_has_a_docs_entry():
    documented = set(
        re.findall(r"auto\w+:: (\w+)", (DOCS / "api.md").read_text(encoding="utf-8"))
    )
    assert documented >= set(ebm_ppl.__all__)
