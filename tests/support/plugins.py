"""Plugins that are right, and broken ones."""

GOOD = """
    from emloc_core.family import Family, Tower
    from emloc_core.hookspecs import hookimpl

    @hookimpl
    def emloc_families():
        tower = Tower(name="language", blocks="model.layers", input_groups=[["mlp.up_proj"]])
        return [Family(name="good", model_types=frozenset({"good"}), towers=[tower])]
"""

WRONG_FIELD = """
    from dataclasses import replace
    from emloc_core.family import Family, Tower
    from emloc_core.hookspecs import hookimpl

    TOWER = Tower(name="language", blocks="model.layers", input_groups=[["mlp.up_proj"]])

    @hookimpl
    def emloc_families():
        return [replace(Family(name="better", model_types=frozenset({"better"}), towers=[TOWER]), FIELD)]
"""

COMMAND = """
    import click
    from emloc_core.hookspecs import hookimpl

    @click.command("hello")
    def command():
        click.echo("hello there")

    @hookimpl
    def emloc_commands():
        return [command]
"""

BROKEN = {
    "import error": "import no_such_module",
    "syntax error": "def (",
    "leaves the program": "raise SystemExit(3)",
    "wrong type": """
        from emloc_core.hookspecs import hookimpl
        @hookimpl
        def emloc_families():
            return ["llama"]
    """,
    "wrong type of model types": GOOD.replace('"good"', '"better"').replace("frozenset", "list"),
    **{
        f"wrong type of {field}": WRONG_FIELD.replace("FIELD", f"{field}={value}")
        for field, value in {
            "name": "5",
            "model_types": "frozenset({5})",
            "towers": "TOWER",
            "auto_class": "None",
            "modality": "'video'",
            "keep_dense": "['lm_head']",
            "nested": "{'text_config': 5}",
            "tiny_configs": "5",
            "tiny_inputs": "{}",
        }.items()
    },
    "no list of towers": WRONG_FIELD.replace("FIELD", "towers=None"),
    "a tower of another type": WRONG_FIELD.replace("FIELD", "towers=[vars(TOWER)]"),
    "wrong type of a tower's groups": WRONG_FIELD.replace("FIELD", "towers=[replace(TOWER, input_groups=['q_proj'])]"),
    "wrong type of a pattern": WRONG_FIELD.replace("FIELD", "keep_dense={5: 'small'}"),
    "duplicate name": GOOD.replace('{"good"}', '{"better"}'),
    "duplicate model type": GOOD.replace('name="good"', 'name="better"'),
    "a model type twice": GOOD.replace('"good"', '"better"').replace("return [", "return 2 * ["),
    "unknown hook": """
        from emloc_core.hookspecs import hookimpl
        @hookimpl
        def emloc_familys():
            return []
    """,
    "unmarked hook": """
        def emloc_families():
            return []
    """,
    "a single family": GOOD.replace("return [Family", "return Family").replace(")]", ")"),
    "a single command": COMMAND.replace("[command]", "command"),
    "raising hook": """
        from emloc_core.hookspecs import hookimpl
        @hookimpl
        def emloc_families():
            raise RuntimeError("out of order")
    """,
    "wrong argument": """
        from emloc_core.hookspecs import hookimpl
        @hookimpl
        def emloc_families(configuration):
            return []
    """,
    "raising commands": """
        from emloc_core.hookspecs import hookimpl
        @hookimpl
        def emloc_commands():
            raise RuntimeError("out of order")
    """,
    "no command": """
        from emloc_core.hookspecs import hookimpl
        @hookimpl
        def emloc_commands():
            return ["compress"]
    """,
    "an objective that cannot be made": """
        from emloc_core.hookspecs import hookimpl
        @hookimpl
        def emloc_objectives():
            return {"pixels": "no class"}
    """,
    "built-in command's name": COMMAND.replace("hello", "compress"),
    "duplicate command": COMMAND,
}
#: Plugins that are found broken when an algorithm is asked for.

RAISING_OBSERVER = """
    from emloc_core.hookspecs import hookimpl

    @hookimpl
    def emloc_block_done(stage):
        raise RuntimeError(f"cannot observe {stage}")
"""
