"""Command line: `megalite VERB --help` describes each verb. Heavy imports wait until a verb needs
them."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import signal
import sys
import textwrap
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megalite import __version__
from megalite.commands.parser import VerbParser, add_config, add_late, add_overrides
from megalite.runtime import error_file
from megalite.runtime.exit_codes import Exit, at_least, end_process, flush_output, killed_by, passes
from megalite.utils.secrecy import hide_secrets

if TYPE_CHECKING:
    from megalite.commands.parser import Verbs


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb with the arguments `argv` (default: those of the process). Return the exit
    status, one of `exit_codes.py`. A user's mistake is explained without a traceback."""
    parser = make_parser()
    arguments, rest = parser.parse_known_args(sys.argv[1:] if argv is None else argv)
    # argparse collects positional arguments only once: overrides behind an option are left over in
    # `rest`.
    if rest and not (
        hasattr(arguments, "overrides") and all("=" in word and word[0] != "-" for word in rest)
    ):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        arguments.overrides += rest
    from megalite.checkpoint.tensors import CheckpointError, NotSaved
    from megalite.errors import ConfigError, DataError, NotFinite

    try:
        return arguments.verb(arguments) or Exit.DONE
    except (ConfigError, DataError, CheckpointError) as error:
        # A bad disk, unlike a mistake in the config, may be one rank's alone.
        rank = os.environ.get("RANK")
        _complain(f"error{f' on rank {rank}' if rank else ''}: {error}\n")
        error_file.leave(str(error))
        mistake = Exit.FAILED if passes(error) else Exit.MISTAKE
        mistake = Exit.BAD_NUMBERS if isinstance(error, NotFinite) else mistake
        return _failed(Exit.NOT_SAVED if isinstance(error, NotSaved) else mistake)
    except KeyboardInterrupt:
        return _failed(killed_by(signal.SIGINT))
    except Exception as error:
        # Printed here, not by Python, to hide passwords in messages of libraries. The rank comes
        # first, as in torch's.
        rank = os.environ.get("RANK")
        _complain(textwrap.indent(traceback.format_exc(), f"[rank{rank}]: " if rank else ""))
        error_file.leave(f"{type(error).__name__}: {error}", traceback.format_exc())
        return _failed(Exit.FAILED)
    finally:
        flush_output()


def _failed(status: int) -> int:
    """Return `status`. In a distributed run, end the process with it at once: Python's normal exit
    may be aborted by threads of the process groups, and the launcher must learn this status."""
    distributed = sys.modules.get("torch.distributed")
    if distributed and distributed.is_initialized() and distributed.get_world_size() > 1:
        flush_output()
        end_process(status)
    return status


def _complain(text: str) -> None:
    """Write to stderr, with secrets hidden."""
    with contextlib.suppress(OSError):  # the full disk may be the log's own
        sys.stderr.write(hide_secrets(text))


def make_parser() -> VerbParser:
    """Return the parser of all verbs."""
    parser = VerbParser(
        prog="megalite",
        description="Train large language models, on a laptop or a cluster. `megalite VERB --help` describes a verb.",
    )
    parser.add_argument("--version", action="version", version=f"megalite {__version__}")
    verbs = parser.add_verbs()
    add_late(
        verbs, "config", "show every key of a config, presets of models, a config to start from"
    )
    add_late(verbs, "corpus", "clean, deduplicate and split raw text")
    add_late(verbs, "tokenizer", "train a tokenizer")
    add_late(verbs, "preprocess", "tokenize text, or rows of labelled data, into token files")
    for add in (
        _add_train,
        _add_sweep,
        _add_ladder,
        _add_job,
        _add_preflight,
        _add_plan,
        _add_dryrun,
        _add_generate,
        _add_fill,
        _add_embed,
        _add_classify,
        _add_answer,
        _add_evaluate,
        _add_serve,
        _add_average,
        _add_quantize,
        _add_prune,
        _add_inspect,
        _add_trace,
        _add_forget,
        _add_contamination,
        _add_parity,
        _add_ops,
    ):
        add(verbs)
    add_late(verbs, "chat", "talk to a model in the terminal")
    add_late(verbs, "runs", "list the runs in a folder: model, layout, steps, losses, state")
    add_late(verbs, "compare", "compare runs: curves, what they came to, settings that differ")
    add_late(verbs, "convert", "write a model as a Hugging Face folder")
    return parser


def _add_model(parser: argparse.ArgumentParser) -> None:
    """Add the argument of a verb that takes a model."""
    parser.add_argument(
        "model", type=Path, help="a run, a checkpoint of one, or a Hugging Face folder"
    )


def _add_layout(parser: argparse.ArgumentParser) -> None:
    """Add the options of a verb that can run over ranks."""
    parser.add_argument(
        "--tensor", type=int, default=1, help="ranks that share every matrix, under torchrun"
    )
    parser.add_argument(
        "--pipeline", type=int, default=1, help="ranks that each hold some layers, under torchrun"
    )


def _add_calibration(parser: argparse.ArgumentParser) -> None:
    """Add the options of a verb that runs a model over rows of token files."""
    parser.add_argument(
        "--data", metavar="PREFIX", help="token files to calibrate and measure with"
    )
    parser.add_argument(
        "--rows", type=at_least(2), default=128, help="rows taken from them (default: 128)"
    )
    parser.add_argument(
        "--length", type=at_least(1), default=512, help="tokens of a row (default: 512)"
    )


def _add_train(verbs: Verbs) -> None:
    parser = verbs.add_parser(
        "train", help="train as a config says; run it alone, under torchrun or under srun"
    )
    add_config(parser, "train.steps=100")
    parser.add_argument(
        "--print-plan", action="store_true", help="show what follows from the config, and stop"
    )
    parser.set_defaults(verb=_train)


def _train(arguments: argparse.Namespace) -> Exit:
    """Train, or print the plan."""
    from megalite.config_file import load_config

    config = load_config(arguments.config, arguments.overrides)
    if arguments.print_plan:
        from megalite.comm.mesh import Launch
        from megalite.models import weight_table
        from megalite.plan import make_plan, smallest_world

        launch = Launch.from_environment()
        # Without a launcher, plan for the fewest ranks that the layout needs.
        world_size = launch.world_size if launch.world_size > 1 else smallest_world(config)
        if launch.rank == 0:
            plan = make_plan(config, weight_table(config.model, config.lora), world_size)
            print(plan.describe())
            if plan.engine == "deepspeed":
                import json

                from megalite.engine.deepspeed import deepspeed_config

                print(
                    f"DeepSpeed's configuration:\n{json.dumps(deepspeed_config(config, plan), indent=2)}"
                )
        return Exit.DONE
    from megalite.comm.mesh import leave
    from megalite.train import train

    ended = train(config)
    leave(ended)
    return ended


def _add_sweep(verbs: Verbs) -> None:
    parser = verbs.add_parser(
        "sweep", help="search for a config's best settings; each trial is a run"
    )
    add_config(parser, "trials=40", "sweep", "YAML file; see docs/sweep.md")
    parser.add_argument(
        "--coordinate-check", type=at_least(1), nargs="+", metavar="HIDDEN",
        help="the file is a config: train it a few steps at these hidden sizes, and draw how large its layers' outputs "
        "become (docs/mup.md)",
    )  # fmt: skip
    parser.set_defaults(verb=_sweep)


def _sweep(arguments: argparse.Namespace) -> Exit:
    if arguments.coordinate_check:
        from megalite.sweep.coordinates import check_coordinates

        print(check_coordinates(arguments.sweep, arguments.overrides, arguments.coordinate_check))
        return Exit.DONE
    from megalite.sweep.run import run_sweep

    return run_sweep(arguments.sweep, arguments.overrides)


def _add_ladder(verbs: Verbs) -> None:
    parser = verbs.add_parser(
        "ladder",
        help="train small models for several lengths, and foretell the loss of a large one",
    )
    add_config(parser, "parallel=2", "ladder", "YAML file; see docs/ladder.md")
    parser.set_defaults(verb=_ladder)


def _ladder(arguments: argparse.Namespace) -> Exit:
    from megalite.ladder.run import run_ladder

    return run_ladder(arguments.ladder, arguments.overrides)


def _add_job(verbs: Verbs) -> None:
    parser = verbs.add_parser(
        "job",  # without help: it is not listed
        description="Print what a launcher must know: ranks a node, nodes to use, the run's folder.",
    )
    add_config(parser, "train.steps=100")
    parser.add_argument(
        "--nodes", type=int, default=1, metavar="N", help="how many there are (default: 1)"
    )
    parser.add_argument(
        "--ranks-per-node",
        type=int,
        default=0,
        metavar="N",
        help="such as GPUs (default: what the config needs)",
    )
    parser.set_defaults(verb=_job)


def _job(arguments: argparse.Namespace) -> None:
    """Print the ranks per node, the number of nodes and the run's folder, on one line for shell
    scripts."""
    from megalite.config_file import load_config
    from megalite.models import weight_table
    from megalite.plan import nodes_that_fit, smallest_world

    config = load_config(arguments.config, arguments.overrides)
    ranks = arguments.ranks_per_node or -(-smallest_world(config) // arguments.nodes)
    table = weight_table(config.model, config.lora)
    print(ranks, nodes_that_fit(config, table, arguments.nodes, ranks), config.run.folder)


def _add_preflight(verbs: Verbs) -> None:
    parser = verbs.add_parser(
        "preflight", help="look whether all nodes are fit for a run; start it as the run is"
    )
    add_config(parser, "train.steps=100")
    parser.add_argument(
        "--interconnect",
        help="what joins the nodes, a name from configs/interconnects.yaml or a YAML file: nodes whose GPUs do not "
        "come near its bandwidth are not fit",
    )
    parser.set_defaults(verb=_preflight)


def _preflight(arguments: argparse.Namespace) -> Exit:
    from megalite.comm.mesh import Launch
    from megalite.config_file import load_config
    from megalite.health.preflight import preflight

    launch, config = Launch.from_environment(), load_config(arguments.config, arguments.overrides)
    store = launch.meet(config.health.hang_timeout_s or 1800.0)
    return preflight(config, launch, store, arguments.interconnect)


def _add_plan(verbs: Verbs) -> None:
    parser = verbs.add_parser(
        "plan",
        help="predict memory, step time and MFU of a config on a cluster; find its best layout",
    )
    add_config(parser, "train.steps=100")
    parser.add_argument("--gpus", type=int, required=True, help="how many, all together")
    parser.add_argument(
        "--gpu",
        required=True,
        help="a name from configs/chips.yaml, or a YAML file with the same fields",
    )
    parser.add_argument(
        "--nodes-of", type=int, default=8, metavar="N", help="GPUs of a node (default: 8)"
    )
    parser.add_argument(
        "--interconnect",
        help="a name from configs/interconnects.yaml, or a YAML file (default: ib-ndr)",
    )
    parser.add_argument(
        "--tokens",
        help="of the whole training, such as 300B or 15T (default: those of the config's steps)",
    )
    parser.add_argument(
        "--search",
        action="store_true",
        help="rank all layouts that fit, and write the best as a config",
    )
    parser.add_argument(
        "--output",
        type=Path,
        help="where --search writes it (default: best.yaml, if there is none yet)",
    )
    parser.add_argument("--picture", type=Path, help="PNG to draw the step's timeline to")
    parser.set_defaults(verb=_plan)


def _plan(arguments: argparse.Namespace) -> None:
    from megalite.config_file import load_config
    from megalite.errors import ConfigError
    from megalite.planner.run import run_plan
    from megalite.utils.outside import check_apart

    for written in filter(None, (arguments.output, arguments.picture)):
        check_apart(written, [arguments.config], ConfigError)
    run_plan(
        load_config(arguments.config, arguments.overrides),
        num_gpus=arguments.gpus,
        gpu=arguments.gpu,
        gpus_per_node=arguments.nodes_of,
        interconnect=arguments.interconnect,
        tokens=arguments.tokens,
        with_search=arguments.search,
        output=arguments.output,
        picture=arguments.picture,
    )


def _add_dryrun(verbs: Verbs) -> None:
    parser = verbs.add_parser(
        "dryrun",
        help="run the training program as ranks of a cluster that is not there: memory, messages, waits",
    )
    add_config(parser, "train.steps=100")
    parser.add_argument("--gpus", type=at_least(1), required=True, help="how many, all together")
    parser.add_argument(
        "--gpu", required=True, help="a name from configs/chips.yaml, or a YAML file as for `plan`"
    )
    parser.add_argument(
        "--nodes-of", type=int, default=8, metavar="N", help="GPUs of a node (default: 8)"
    )
    parser.add_argument(
        "--ranks",
        default="roles",
        help="roles: those that differ; all; or numbers such as 0,384 (default: roles)",
    )
    parser.add_argument(
        "--steps", type=at_least(2), default=3, help="steps that each rank makes (default: 3)"
    )
    parser.set_defaults(verb=_dryrun)


def _dryrun(arguments: argparse.Namespace) -> Exit:
    from megalite.config_file import load_config
    from megalite.dryrun.run import run_dryrun

    return run_dryrun(
        load_config(arguments.config, arguments.overrides),
        num_gpus=arguments.gpus,
        gpu=arguments.gpu,
        gpus_per_node=arguments.nodes_of,
        ranks=arguments.ranks,
        steps=arguments.steps,
    )


def _add_generate(verbs: Verbs) -> None:
    parser = verbs.add_parser(
        "generate",
        help="continue a prompt with a trained model",
        description="The model's generation_config.json says what is left out here; else temperature 0.8, top-p 0.95.",
    )
    _add_model(parser)
    parser.add_argument("--prompt", required=True)
    parser.add_argument(
        "--chat", action="store_true", help="the prompt is a message, put as the chat template says"
    )
    parser.add_argument(
        "--max-tokens", type=int, help="of the answer (default: as the model says, else 128)"
    )
    parser.add_argument("--temperature", type=float, help="0 takes the likeliest token")
    parser.add_argument("--top-k", type=int, help="only the k likeliest tokens; 0: no limit")
    parser.add_argument(
        "--top-p", type=float, help="only the likeliest tokens that together are as likely as this"
    )
    parser.add_argument(
        "--min-p", type=float, help="only tokens at least this share as likely as the likeliest"
    )
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before it; may be repeated"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--beams", type=at_least(1), help="beam search with so many (encoder-decoders)"
    )
    parser.add_argument(
        "--length-penalty", type=float, default=1.0, help="its power of the length (default: 1)"
    )
    _add_layout(parser)
    parser.set_defaults(verb=_generate)


def _generate(arguments: argparse.Namespace) -> None:
    """Print the answer to one prompt as it is generated."""
    from dataclasses import replace

    from megalite.comm.mesh import Launch, leave
    from megalite.data.chat import ChatTemplate
    from megalite.data.tokenizer import load_tokenizer
    from megalite.errors import ConfigError
    from megalite.infer.generate import Generator, find_model
    from megalite.models import model_config

    launch = Launch.from_environment()
    layout = {"tensor": arguments.tensor, "pipeline": arguments.pipeline}
    folder = find_model(arguments.model)
    if folder != arguments.model and launch.rank == 0:
        print(f"{arguments.model}: {folder}", file=sys.stderr)  # beside the answer, not in it
    if model_config({"hf": str(folder)}).task == "seq2seq":
        return _generate_target(arguments)
    if arguments.beams:
        raise ConfigError(f"--beams is for encoder-decoders; {folder} holds a decoder")
    if arguments.chat:
        # Fails before the weights are read, which takes long.
        ChatTemplate.of(folder, load_tokenizer(folder))
    generator = Generator.open(folder, num_slots=1, launch=launch, **layout)
    names = ("temperature", "top_k", "top_p", "min_p", "seed")
    asked = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    said = arguments.prompt
    prompt = (
        generator.chat_ids([{"role": "user", "content": said}])
        if arguments.chat
        else generator.prompt_ids(said)
    )
    most = arguments.max_tokens
    most = generator.habits.most_tokens(len(prompt), 128) if most is None else most
    request = generator.request(prompt, most, replace(generator.sampling, **asked), arguments.stop)
    request = generator.as_chat(request) if arguments.chat else request
    for text in itertools.chain([] if arguments.chat else [said], generator.stream(request), "\n"):
        if launch.rank == 0:  # the other ranks compute the same
            print(text, end="", flush=True)
    leave()


def _generate_target(arguments: argparse.Namespace) -> None:
    """Print an encoder-decoder's target for the prompt, its source."""
    from dataclasses import replace

    from megalite.errors import ConfigError
    from megalite.infer.seq2seq import Beams, TargetGenerator

    if arguments.chat or arguments.stop or arguments.tensor * arguments.pipeline > 1:
        raise ConfigError(
            "an encoder-decoder has no --chat and no --stop, and answers on one device"
        )
    generator = TargetGenerator.open(arguments.model)
    names = ("temperature", "top_k", "top_p", "min_p", "seed")
    asked = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    sampling = replace(generator.habits.sampling, **asked)
    beams = Beams(arguments.beams, arguments.length_penalty) if arguments.beams else None
    most = arguments.max_tokens or generator.habits.most_tokens(0, 128)
    print(generator.answer([arguments.prompt], most, sampling, beams)[0])


def _add_fill(verbs: Verbs) -> None:
    parser = verbs.add_parser("fill", help="have an encoder tell what stands in the gaps of texts")
    _add_model(parser)
    parser.add_argument("texts", nargs="*", metavar="TEXT", help="with [MASK] for each gap")
    parser.add_argument(
        "--input",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="a text a line; .jsonl",
    )
    parser.add_argument(
        "--top-k", type=int, default=5, help="guesses for each gap (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print a JSON object for each text")
    parser.set_defaults(verb=_fill)


def _fill(arguments: argparse.Namespace) -> None:
    """Print the likeliest tokens for each gap."""
    import json

    from megalite.errors import ConfigError
    from megalite.infer.encode import Encoder, read_texts

    texts = [*arguments.texts, *read_texts(arguments.input)]
    if not texts or arguments.top_k < 1:
        raise ConfigError("give a TEXT with a [MASK], or --input FILE, and --top-k of at least 1")
    filled = Encoder.open(arguments.model, fills=True).fill(texts, arguments.top_k)
    for text, gaps in zip(texts, filled, strict=True):
        if arguments.json:
            print(
                json.dumps(
                    {"text": text, "gaps": [[guess._asdict() for guess in gap] for gap in gaps]}
                )
            )
            continue
        print(text)
        for gap in gaps:
            print("  " + "  ".join(f"{guess.text} {guess.probability:.3f}" for guess in gap))


def _add_embed(verbs: Verbs) -> None:
    parser = verbs.add_parser("embed", help="make a vector of each text with an encoder")
    _add_model(parser)
    parser.add_argument("texts", nargs="*", metavar="TEXT")
    parser.add_argument(
        "--input",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="a text a line; .jsonl",
    )
    parser.add_argument(
        "--output", type=Path, help=".npy, or .jsonl (default: JSON lines to the console)"
    )
    parser.add_argument(
        "--pooling",
        choices=("mean", "cls"),
        help="of tokens (default: as the model says, else mean)",
    )
    parser.add_argument(
        "--normalize",
        action=argparse.BooleanOptionalAction,
        help="to length 1 (default: as the model says, else not)",
    )
    parser.set_defaults(verb=_embed)


def _embed(arguments: argparse.Namespace) -> None:
    """Write the vectors of texts."""
    from megalite.errors import ConfigError
    from megalite.infer.encode import Encoder, read_texts, write_vectors
    from megalite.utils.outside import check_apart

    output: Path | None = arguments.output
    if output and output.suffix not in (".npy", ".jsonl"):
        raise ConfigError(f"--output {output} must end in .npy or .jsonl")
    if output:
        check_apart(output, arguments.input, ConfigError)
    texts = [*arguments.texts, *read_texts(arguments.input)]
    if not texts:
        raise ConfigError("give a TEXT, or --input FILE")
    vectors = Encoder.open(arguments.model).embed(texts, arguments.pooling, arguments.normalize)
    write_vectors(output, texts, vectors)
    if output:
        print(f"{output}: {len(vectors):,} vectors of {vectors.shape[1]:,} numbers")


def _add_classify(verbs: Verbs) -> None:
    parser = verbs.add_parser(
        "classify", help="tell classes of texts, a number for them, or labels of their words"
    )
    _add_model(parser)
    parser.add_argument("texts", nargs="*", metavar="TEXT")
    parser.add_argument("--pair", metavar="TEXT", help="a second text that goes with the TEXT")
    parser.add_argument(
        "--input",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="a text a line; or rows as for training in a .jsonl",
    )
    parser.add_argument(
        "--top-k", type=at_least(1), default=5, help="classes that are shown (default: %(default)s)"
    )
    parser.add_argument(
        "--json", action="store_true", help="print a row, as for training, for each text"
    )
    parser.set_defaults(verb=_classify)


def _classify(arguments: argparse.Namespace) -> None:
    """Print what a model tells of texts."""
    from megalite.errors import ConfigError
    from megalite.infer.classify import Classifier, Question, read_questions

    questions = [Question(text) for text in arguments.texts]
    if arguments.pair is not None:
        if len(questions) != 1:
            raise ConfigError(
                "--pair goes with one TEXT; more pairs are rows of an --input FILE.jsonl"
            )
        questions = [questions[0]._replace(pair=arguments.pair)]
    questions += read_questions(arguments.input)
    if not questions:
        raise ConfigError("give a TEXT, or --input FILE")
    classifier = Classifier.open(arguments.model)
    for question, verdict in zip(questions, classifier.classify(questions), strict=True):
        print(classifier.shown(question, verdict, arguments.top_k, arguments.json), flush=True)


def _add_answer(verbs: Verbs) -> None:
    parser = verbs.add_parser("answer", help="find the answers to questions in texts")
    _add_model(parser)
    parser.add_argument("--question", help="with --context")
    parser.add_argument("--context", help="the text to find the answer in")
    parser.add_argument(
        "--input",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="rows as for training in a .jsonl; where they have answers, exact match and F1 are told",
    )
    parser.add_argument(
        "--may-be-none", action="store_true", help="a text may not answer (SQuAD 2.0)"
    )
    parser.add_argument("--json", action="store_true", help="print a JSON object for each question")
    parser.set_defaults(verb=_answer)


def _answer(arguments: argparse.Namespace) -> None:
    """Print the answers to questions, and how many of them are those that the rows have."""
    from megalite.errors import ConfigError
    from megalite.infer.reading import Asked, Reader, read_asked, scores

    asked = read_asked(arguments.input)
    if arguments.question and arguments.context:
        asked.append(Asked(arguments.question, arguments.context))
    elif arguments.question or arguments.context or not asked:
        raise ConfigError("give --question and --context, or --input FILE.jsonl")
    found = Reader.open(arguments.model).answer(asked, arguments.may_be_none)
    for each, answer in zip(asked, found, strict=True):
        print(answer.shown(each, arguments.json))
    if any(each.wanted is not None for each in asked):
        print(scores(asked, [answer.text for answer in found]), file=sys.stderr)


def _add_evaluate(verbs: Verbs) -> None:
    parser = verbs.add_parser(
        "eval",
        help="measure a trained model: held-out loss, tasks of lm-evaluation-harness, answers",
        description="Without --tasks and --data it tells the loss, perplexity and bits per byte on the validation data "
        "of the run, or on --tokens.",
    )
    _add_model(parser)
    parser.add_argument(
        "--tasks", default="", metavar="NAME,NAME", help="names or YAML files of tasks"
    )
    parser.add_argument("--include-path", type=Path, metavar="FOLDER", help="where more tasks are")
    parser.add_argument(
        "--data",
        type=Path,
        help="jsonl of `prompt` and wanted `completion`, or chats: BLEU, ROUGE, F1 ...",
    )
    parser.add_argument(
        "--tokens",
        metavar="PREFIX",
        help="token files to measure the loss on (default: the run's own)",
    )
    parser.add_argument(
        "--limit", type=int, help="only so many documents of each task, or samples of a loss"
    )
    parser.add_argument(
        "--shots", type=int, help="examples before each document (default: as the task says)"
    )
    parser.add_argument("--chat", action="store_true", help="put prompts as the chat template says")
    parser.add_argument(
        "--max-tokens", type=int, default=128, help="of an answer to a prompt of --data"
    )
    parser.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="ends such an answer; repeatable",
    )
    parser.add_argument(
        "--output", type=Path, help="JSON file (default: in the folder `evaluations` of the run)"
    )
    parser.add_argument(
        "--samples",
        action="store_true",
        help="beside it, what was asked, said and wanted, as jsonl",
    )
    parser.add_argument(
        "--slots", type=int, default=8, help="answers generated at a time (default: 8)"
    )
    _add_layout(parser)
    parser.set_defaults(verb=_evaluate)


def _evaluate(arguments: argparse.Namespace) -> None:
    from megalite.comm.mesh import leave
    from megalite.infer.evaluate import Asked, evaluate_model

    names = {name: getattr(arguments, name) for name in Asked._fields}
    asked = Asked(
        **names | {"tasks": [name.strip() for name in arguments.tasks.split(",") if name.strip()]}
    )
    layout = {"tensor": arguments.tensor, "pipeline": arguments.pipeline}
    evaluate_model(arguments.model, asked, arguments.output, arguments.slots, **layout)
    leave()


def _add_serve(verbs: Verbs) -> None:
    parser = verbs.add_parser(
        "serve", help="answer over HTTP as OpenAI's API does, with a page to talk to the model"
    )
    _add_model(parser)
    parser.add_argument("--name", help="of the model, for clients (default: that of the folder)")
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="0.0.0.0 for all of this machine's (default: %(default)s)",
    )
    parser.add_argument("--port", type=int, default=8000, help="(default: %(default)s)")
    parser.add_argument(
        "--slots", type=int, default=8, help="answers computed at a time (default: %(default)s)"
    )
    parser.add_argument(
        "--max-length",
        type=int,
        default=4096,
        help="tokens of prompt and answer (default: %(default)s)",
    )
    parser.add_argument(
        "--api-key-file",
        type=Path,
        help="keys that open the API, a line each (default: MEGALITE_API_KEY, if set)",
    )
    parser.add_argument(
        "--ratings",
        type=Path,
        default=Path("ratings"),
        help="folder for them (default: %(default)s)",
    )
    parser.add_argument("--max-request-mb", type=float, default=1.0, help="(default: %(default)s)")
    parser.add_argument(
        "--requests-per-minute", type=int, default=0, help="of a key or an address; 0: no limit"
    )
    parser.add_argument(
        "--timeout", type=float, default=600.0, help="seconds of an answer (default: %(default)s)"
    )
    parser.add_argument(
        "--grace",
        type=float,
        default=20.0,
        help="seconds to end after SIGTERM (default: %(default)s)",
    )
    parser.add_argument(
        "--log-prompts", action="store_true", help="also log what is asked; it is not otherwise"
    )
    parser.set_defaults(verb=_serve)


def _serve(arguments: argparse.Namespace) -> None:
    """Serve a model. The address is bound before the weights are read."""
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        from megalite.errors import ConfigError

        raise ConfigError(f"serving needs {error.name}; pip install 'megalite[serve]'") from None
    from megalite.infer.classify import Classifier
    from megalite.infer.encode import Encoder
    from megalite.infer.generate import Generator, find_model
    from megalite.infer.seq2seq import TargetGenerator
    from megalite.infer.serving.app import Settings
    from megalite.infer.serving.guards import read_keys
    from megalite.infer.serving.run import bind, serve
    from megalite.models import model_config

    settings = Settings(
        name=arguments.name or arguments.model.resolve().name,
        ratings=arguments.ratings,
        keys=read_keys(arguments.api_key_file),
        max_bytes=int(arguments.max_request_mb * 1e6),
        requests_per_minute=arguments.requests_per_minute,
        timeout_s=arguments.timeout,
        log_prompts=arguments.log_prompts,
        host=arguments.host,
    )
    address = bind(arguments.host, arguments.port)
    folder = find_model(arguments.model)
    config = model_config({"hf": str(folder)})
    model: Encoder | Classifier | TargetGenerator | Generator
    if config.PREDICTS == "masked":
        model = Encoder.open(folder)
    elif config.has_classes:
        model = Classifier.open(folder)
    elif config.task == "seq2seq":
        model = TargetGenerator.open(folder)
    else:
        model = Generator.open(folder, num_slots=arguments.slots, max_length=arguments.max_length)
    serve(model, settings, address, arguments.grace)


def _add_average(verbs: Verbs) -> None:
    parser = verbs.add_parser(
        "average",
        help="average the weights of checkpoints or models, or merge them by another method",
        description="Checkpoints of the flat part of a wsd schedule averaged are about what a decay would end in.",
    )
    parser.add_argument(
        "models", type=Path, nargs="+", metavar="MODEL", help="checkpoints, or Hugging Face folders"
    )
    parser.add_argument(
        "-o", "--output", type=Path, required=True, help="a new Hugging Face folder"
    )
    parser.add_argument(
        "--shares", type=float, nargs="+", metavar="X", help="weigh the models (default: all alike)"
    )
    parser.add_argument(
        "--method", choices=("linear", "task_arithmetic", "ties", "slerp"), default="linear",
        help="the mean; sums of what models learned since --base, whole or trimmed and by elected sign; the point on "
        "the arc between two models (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--base", type=Path, metavar="MODEL", help="what the models began as")
    parser.add_argument(
        "--scale", type=float, metavar="X", help="of what is added to the base (default: 1)"
    )
    parser.add_argument(
        "--density", type=float, nargs="+", metavar="X",
        help="share of what a model learned that ties keeps, for all or one each (default: 0.2)",
    )  # fmt: skip
    parser.add_argument(
        "--dtype", choices=("bf16", "fp16", "fp32"), help="of the weights (default: as stored)"
    )
    parser.set_defaults(verb=_average)


def _average(arguments: argparse.Namespace) -> None:
    """Write several models as one."""
    from rich.console import Console

    from megalite.checkpoint.average import average_of
    from megalite.checkpoint.convert import write_model
    from megalite.infer.generate import find_model

    model = average_of(
        [find_model(path) for path in arguments.models],
        arguments.shares,
        arguments.method,
        arguments.base and find_model(arguments.base),
        arguments.scale,
        arguments.density,
    )
    write_model(model, arguments.output, arguments.dtype, console=Console(stderr=True))
    how = "the average" if arguments.method == "linear" else arguments.method
    print(f"{arguments.output}: {how} of {len(arguments.models)} models")


def _add_quantize(verbs: Verbs) -> None:
    parser = verbs.add_parser(
        "quantize",
        help="write a model with the matrices of its layers in fewer bits",
        description="Writes a Hugging Face folder in compressed-tensors' formats, which transformers and vLLM open, as "
        "do generate, serve, eval and convert here.",
    )
    _add_model(parser)
    parser.add_argument("output", type=Path, help="a new Hugging Face folder")
    parser.add_argument(
        "--scheme", choices=("w8a8", "w4a16", "fp8", "fp8_block"), default="w8a8",
        help="int8 with inputs in int8; 4-bit integers in groups; fp8 by row, or in blocks (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--method", choices=("rtn", "gptq", "awq", "smoothquant"), default="rtn",
        help="to the nearest number; or, by --data, made up for errors, or inputs scaled first (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--group",
        type=at_least(1),
        default=128,
        help="columns of a w4a16 scale, size of a block (default: 128)",
    )
    _add_calibration(parser)
    parser.set_defaults(verb=_quantize)


def _quantize(arguments: argparse.Namespace) -> None:
    """Write a quantised model, and say what it costs."""
    from rich.console import Console

    from megalite.checkpoint.convert import write_model
    from megalite.infer.generate import find_model
    from megalite.quantization.layers import LayerRuns
    from megalite.quantization.run import quantised
    from megalite.quantization.schemes import make_scheme

    folder, runs = find_model(arguments.model), None
    if arguments.data:
        runs = LayerRuns.from_tokens(folder, arguments.data, arguments.rows, arguments.length)
    model, report = quantised(
        folder, make_scheme(arguments.scheme, arguments.group), arguments.method, runs
    )
    write_model(model, arguments.output, console=Console(stderr=True))
    of = "outputs" if runs else "weights"
    print(
        f"{arguments.output}: {len(report.errors)} matrices, mean error of their {of} {report.mean_error:.2e}"
    )
    if runs and report.perplexities:
        before, after = report.perplexities
        print(f"perplexity of {len(runs.held_out)} rows held out: {before:.4f} → {after:.4f}")


def _add_prune(verbs: Verbs) -> None:
    parser = verbs.add_parser(
        "prune",
        help="write a model of which single weights, or whole parts, are left out",
        description="Parts are left out by what they do on --data, and the model that stays is a smaller one of its "
        "family; single weights of its layers' matrices become 0.",
    )
    _add_model(parser)
    parser.add_argument("output", type=Path, help="a new Hugging Face folder")
    for word, what in (
        ("layers", "layers"), ("hidden", "channels of hidden states"), ("heads", "heads of queries"),
        ("kv-heads", "heads of keys and values"), ("inner", "inner features of an MLP, or of an expert"),
        ("experts", "experts of a layer"),
    ):  # fmt: skip
        parser.add_argument(f"--{word}", type=at_least(1), metavar="N", help=f"{what} that stay")
    parser.add_argument(
        "--sparsity", metavar="X", help="share of single weights to set to 0, or 2:4, of every four"
    )
    parser.add_argument(
        "--method", choices=("magnitude", "wanda", "sparsegpt"),
        help="single weights by size; times that of inputs; or making up for them (default: magnitude)",
    )  # fmt: skip
    _add_calibration(parser)
    parser.set_defaults(verb=_prune)


def _prune(arguments: argparse.Namespace) -> None:
    """Write a pruned model, and say what it costs."""
    from megalite.infer.generate import find_model
    from megalite.pruning.run import prune_parts, prune_weights
    from megalite.pruning.structured import Target

    folder, target = find_model(arguments.model), Target(
        arguments.layers, arguments.hidden, arguments.heads, arguments.kv_heads, arguments.inner, arguments.experts
    )  # fmt: skip
    data = arguments.data, arguments.rows, arguments.length
    if arguments.sparsity or arguments.method:
        prune_weights(folder, arguments.output, target, arguments.sparsity, arguments.method, *data)
    else:
        prune_parts(folder, arguments.output, target, *data)


def _add_inspect(verbs: Verbs) -> None:
    parser = verbs.add_parser(
        "inspect", help="show what is in token files, or what a config makes of them"
    )
    parser.add_argument(
        "what", help="PREFIX of token files, or a config (.yaml) to see samples as its model will"
    )
    add_overrides(parser, "of a config, such as data.packing=best_fit")
    parser.add_argument(
        "--count", type=int, default=2, help="documents or samples to print (default: 2)"
    )
    parser.add_argument(
        "--start", type=int, default=0, help="number of the first of them (default: 0)"
    )
    parser.add_argument(
        "--split", choices=("train", "valid", "test"), default="train", help="of a config"
    )
    parser.add_argument("--tokenizer", type=Path, help="for token files; a config names its own")
    parser.set_defaults(verb=_inspect)


def _inspect(arguments: argparse.Namespace) -> None:
    """Show token files, or the samples of a config."""
    from rich.console import Console

    from megalite.config_file import load_config
    from megalite.data.inspect import inspect_file, inspect_samples

    console, count, start = Console(soft_wrap=True), arguments.count, arguments.start
    if arguments.what.endswith((".yaml", ".yml")):
        config = load_config(arguments.what, arguments.overrides)
        inspect_samples(config, arguments.split, count, start, console)
    else:
        inspect_file(arguments.what, arguments.tokenizer, count, start, console)


def _add_trace(verbs: Verbs) -> None:
    parser = verbs.add_parser(
        "trace",
        help="say which text a step was trained on, or at which steps a text was",
        description="Exact, and of any step: which sample comes when is arithmetic (docs/trace.md).",
    )
    parser.add_argument("run", type=Path, help="a run, or a config (.yaml) of one to come")
    asked = parser.add_mutually_exclusive_group(required=True)
    asked.add_argument("--step", type=at_least(1), metavar="N", help="counted from 1")
    asked.add_argument(
        "--document", action="append", metavar="FILE:LINE",
        help="or PREFIX#NUMBER of a token file; may be repeated",
    )  # fmt: skip
    parser.add_argument("--sample", type=at_least(0), metavar="N", help="of the step, from 0")
    parser.add_argument("--token", type=at_least(0), metavar="N", help="of the sample, from 0")
    parser.set_defaults(verb=_trace)


def _trace(arguments: argparse.Namespace) -> None:
    """Print what a step was made of, or where documents were trained on."""
    from rich.console import Console

    from megalite.lineage.trace import print_document, print_step

    console = Console(soft_wrap=True)
    if arguments.document:
        print_document(arguments.run, arguments.document, console)
    else:
        print_step(arguments.run, arguments.step, arguments.sample, arguments.token, console)


def _add_forget(verbs: Verbs) -> None:
    parser = verbs.add_parser(
        "forget",
        help="take documents out of a run's data, and go back to before it was trained on them",
        description="Writes token files without them and a run that goes on from the newest checkpoint that has seen "
        "none of them, and ends bit for bit as one that never had them (docs/forget.md).",
    )
    parser.add_argument("run", type=Path, help="folder of a run")
    parser.add_argument(
        "--documents", type=Path, required=True, metavar="FILE",
        help="what to forget, a line each: FILE:LINE, or PREFIX#NUMBER of a token file",
    )  # fmt: skip
    parser.add_argument(
        "--register", type=Path, metavar="FILE",
        help="JSON lines of what was taken out (default: forgotten.jsonl beside the run's folder)",
    )  # fmt: skip
    parser.add_argument(
        "--corpora", action="store_true",
        help="also blank the lines of JSON that they were made of, in the files themselves",
    )  # fmt: skip
    parser.add_argument(
        "--dry-run", action="store_true", help="only say what it costs; nothing is written"
    )
    parser.set_defaults(verb=_forget)


def _forget(arguments: argparse.Namespace) -> None:
    """Say what forgetting costs, and prepare the run that makes the steps again."""
    from rich.console import Console

    from megalite.lineage.forget import forget, plan_removal, read_names

    console = Console(soft_wrap=True, highlight=False, markup=False)
    removal = plan_removal(arguments.run, read_names(arguments.documents), arguments.corpora)
    console.print(str(removal))
    if not arguments.dry_run:
        register = arguments.register or removal.run.config.run.dir / "forgotten.jsonl"
        forget(removal, register, console)


def _add_contamination(verbs: Verbs) -> None:
    parser = verbs.add_parser(
        "contamination",
        help="look for evaluation texts in training data, and say when they are trained on",
        description="Compares token by token, before training or after it (docs/trace.md).",
    )
    parser.add_argument("run", type=Path, help="a run, or a config (.yaml) of one to come")
    parser.add_argument(
        "--tasks", default="", metavar="NAME,NAME", help="of lm-evaluation-harness, as for `eval`"
    )
    parser.add_argument("--include-path", type=Path, metavar="FOLDER", help="where more tasks are")
    parser.add_argument("--limit", type=at_least(1), help="only so many documents of each task")
    parser.add_argument(
        "--data", nargs="+", default=[], metavar="FILE",
        help="rows of `text`, or of `prompt` and `completion`",
    )  # fmt: skip
    parser.add_argument(
        "--ngram", type=at_least(2), default=13, metavar="N",
        help="tokens that must be the same in a row (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--output", type=Path, help="JSON lines of every document")
    parser.set_defaults(verb=_contamination)


def _contamination(arguments: argparse.Namespace) -> None:
    """Print how much of evaluation texts stands in training data."""
    from rich.console import Console

    from megalite.errors import ConfigError
    from megalite.lineage.contamination import Asked, print_contamination, texts_of_rows

    names = [name.strip() for name in arguments.tasks.split(",") if name.strip()]
    if not names and not arguments.data:
        raise ConfigError("say what to look for: --tasks NAME,NAME or --data FILE")
    asked = texts_of_rows(arguments.data) if arguments.data else iter(())
    if names:
        from megalite.infer.evaluate import load_harness

        tasks = load_harness().load_tasks(names, arguments.include_path, arguments.limit, shots=0)
        asked = itertools.chain(asked, (Asked(*found) for found in tasks.texts()))
    console = Console(soft_wrap=True)
    print_contamination(arguments.run, asked, arguments.ngram, arguments.output, console)


def _add_parity(verbs: Verbs) -> None:
    parser = verbs.add_parser(
        "parity",
        help="say whether two runs differ by more than rounding, and where first",
        description="Compare the weights, losses and gradients that two runs recorded under `profile: {tensors: [1, "
        "3]}`. The exit status is 0 where they agree, and 1 where they do not.",
    )
    parser.add_argument("a", type=Path, metavar="A", help="folder of a run")
    parser.add_argument("b", type=Path, metavar="B", help="folder of another")
    parser.add_argument(
        "--step", type=int, action="append", default=[], help="compare this step (default: all)"
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        default=1e-5,
        help="largest relative difference (default: %(default)s, for fp32)",
    )
    parser.set_defaults(verb=_parity)


def _parity(arguments: argparse.Namespace) -> int:
    """Compare two runs; return 1 where they differ."""
    from megalite.observe.parity import compare_runs

    lines, agree = compare_runs(arguments.a, arguments.b, arguments.tolerance, arguments.step)
    print(*lines, sep="\n")
    return 0 if agree else 1


def _add_ops(verbs: Verbs) -> None:
    parser = verbs.add_parser(
        "ops", help="list what computes each fused operation on this machine, and why"
    )
    parser.set_defaults(verb=_ops)


def _ops(arguments: argparse.Namespace) -> None:
    """Print the implementation of each operation, for the CPU and a GPU if there is one."""
    import torch

    from megalite.kernels.library import OPERATIONS, explain

    devices = {"cpu": "CPU"} | (
        {"cuda": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    )
    for device, name in devices.items():
        print(f"{name}:")
        for operation in OPERATIONS:
            implementation, reason = explain(operation, device)
            print(f"  {operation:18}{implementation:12}{reason}")
