"""Wrong inputs of every program, and the one line that each ends with.

How to read the tables: a line that begins with # names a program, `train` for
`python -m experiments.train`, and what the rows below it are about. A row is what is typed after
the program's name and, indented, the line that answers, after "error: "; "..." stands for anything.
Words in braces are files and folders, most of them from `bad_files.py`, whose names say what is
wrong with them, and these:

    {new}       a work directory that is not there yet; train and compare have it if none is given
    {finished}  the work directory of a run that is finished
    {tiny}      the settings of that run
    {classes}   two tasks of new classes
    {vit}       a small vision transformer on two tasks of new classes
    {text}      a small text encoder on two tasks of new classes
    {two}       a base and a model to be merged
    {output}    a file for the merged model

In the first table every row ends with code 2, before anything is trained or written; and a finished
run that the row names can still be read and is byte for byte what it was.
"""

import json
import pathlib
import re
import shlex
import subprocess
import sys
import time
from typing import NamedTuple

import pytest
from absl import flags

from experiments import compare, inspect, merge, report, train
from experiments import flags as experiment_flags
from pm_jax.continual import Config, Learner
from pm_jax.continual.report import inspection
from pm_jax.continual.storage.workdir import held
from tests import bad_files, faults
from tests.small_runs import comparable

WRONG = """
# train: settings out of range
--epochs=0
    --epochs=0: must be at least 1
--epochs=many
    flag --epochs=many: ...; --help lists the flags and what they take
--epochs=1.5
    flag --epochs=1.5: ...; --help lists the flags and what they take
--epochs
    Missing value for flag --epochs; --help lists the flags and what they take
--batch_size=99999999999999999999
    --batch_size=99999999999999999999: must be at most 2147483647
--hidden_sizes=
    --hidden_sizes=(): needs one width or more
--hidden_sizes=a,b
    flag --hidden_sizes=a,b: must be whole numbers separated by commas; --help lists the flags and
    what they take
--hidden_sizes=99999999999
    --hidden_sizes=99999999999: must be at most 2147483647
--num_tasks=0
    --num_tasks=0: must be at least 1
--accumulation_steps=0
    --accumulation_steps=0: must be at least 1
--checkpoint_every=-1
    --checkpoint_every=-1: must not be negative
--keep_checkpoints=0
    --keep_checkpoints=0: must be at least 1
--devices=9
    --devices=9: there are 8; give at most as many, or 0 for all
--devices=-1
    --devices=-1: must not be negative
--devices=8 --fsdp=3
    --fsdp=3: must divide the 8 devices
--fsdp=0
    --fsdp=0: must be at least 1
--devices=8 --batch_size=12
    --batch_size=12: must be a multiple of the 8 devices that examples are divided among
--coordinator_address=host --process_count=2 --process_index=0
    --coordinator_address=host: must be host:port, or auto
--coordinator_address=host:1 --process_index=0
    --process_count=None: must be at least 1
--coordinator_address=host:1 --process_count=2 --process_index=2
    --process_index=2: must be from 0 to 1
--process_count=2
    --process_count=2: goes with coordinator_address=host:port
--coordinator_address=host:1 --process_count=2 --process_index=0 --export=x.safetensors
    --export=x.safetensors: is written by one process; run the same command with it, but without
    coordinator_address, when the run is finished
--landscape_points=1
    --landscape_points=1: must be 0, or at least 2
--learning_rate=0
    --learning_rate=0.0: must be above 0
--learning_rate=nan
    --learning_rate=nan: must be a finite number
--learning_rate=inf
    --learning_rate=inf: must be a finite number
--baseline_learning_rate=0
    --baseline_learning_rate=0.0: must be above 0 and finite
--baseline_learning_rate=nan
    --baseline_learning_rate=nan: must be above 0 and finite
--baseline_epochs=0
    --baseline_epochs=0: must be above 0 and finite
--temperature=0
    --temperature=0.0: must be above 0
--clip_norm=-1
    --clip_norm=-1.0: must not be negative
--epsilon=0
    --epsilon=0.0: must lie in (0, 1]; the paper uses 0.5
--epsilon=1.5
    --epsilon=1.5: must lie in (0, 1]; the paper uses 0.5
--probabilities=0.5,0.4,0.4
    --probabilities=(0.5, 0.4, 0.4): must be at least 0 and sum to 1, as 1/3,1/3,1/3
--probabilities=1/2,1/2
    --probabilities=(0.5, 0.5): 3 are needed
--probabilities=nan,0,1
    flag --probabilities=nan,0,1: must be numbers or fractions separated by commas; --help lists the
    flags and what they take
--milestones=0.8,0.5
    --milestones=(0.8, 0.5): must be fractions between 0 and 1 in rising order
--rotation_step=inf
    --rotation_step=inf: must be a finite number
--crop_scale=0.5,0.2
    --crop_scale=(0.5, 0.2): must be two numbers in (0, 1] in rising order
--randaugment_magnitude=11
    --randaugment_magnitude=11.0: must lie in [0, 10]
--evaluation_resize=0.9
    --evaluation_resize=0.9: must be at least 1
--validation_fraction=1
    --validation_fraction=1.0: must lie between 0 and 1
--resident_mb=-1
    --resident_mb=-1.0: must not be negative
--seeds=-1
    --seeds=-1: needs one or more whole numbers from 0 to 4294967295
--seeds=4294967296
    --seeds=4294967296: needs one or more whole numbers from 0 to 4294967295
--seeds=
    --seeds=: needs one or more whole numbers from 0 to 4294967295
--seeds=1.5
    flag --seeds=1.5: must be whole numbers separated by commas; --help lists the flags and what
    they take

# train: names that are not known
--rule=nonsense
    --rule=nonsense: must be one of perturb_and_merge, sequential, averaging, became, trm, pam,
    fisher_averaging, coma, cofima, task_arithmetic, ties, dare, random_mix, magmax, tunable_magmax,
    exact_curvature, oracle, joint
--rule_settings=clop=1
    --rule_settings=clop=1: clop is not a setting of the rule; perturb_and_merge takes clip=true,
    ... by default
--rule_settings=clip=maybe
    --rule_settings=clip=maybe: must be true or false; perturb_and_merge takes clip=true, ... by
    default
--baseline=x
    --baseline=x: must be one of perturb_and_merge, ...
--perturbation=x
    --perturbation=x: must be one of symmetric, gaussian, one_sided, antithetic, none
--scenario=x
    --scenario=x: must be one of domain_incremental, class_incremental
--augmentation=x
    --augmentation=x: must be one of none, flip, crop_flip, randaugment, autoaugment
--compute_dtype=float16
    --compute_dtype=float16: must be one of float32, bfloat16
--tensorboard=maybe
    flag --tensorboard=maybe: ...; --help lists the flags and what they take
--nonsense=1
    Unknown command line flag 'nonsense'; --help lists the flags and what they take
stray
    'stray': not a flag; settings are given as --name=value

# train: settings that contradict each other
--perturb_per=example
    --perturb_per=example: needs adapter=lora; use perturb_per=batch
--from_task=1
    --from_task=1: with branch_from from 1 to num_tasks=5, without it 0
--trust=shrink --rule=averaging
    --trust=shrink: rule=averaging with rule_settings= has no closed form for one coefficient; use
    warn, or perturb_and_merge with one
--curvature=exact_all --rule=became
    --curvature=exact_all: rule=became takes curvature of one task at a time; use fisher_exact, or
    perturb_and_merge
--curvature=kronecker --rule=fisher_averaging
    --curvature=kronecker: rule=fisher_averaging takes curvature entry by entry; use fisher_exact,
    or perturb_and_merge or became
--classifier=discriminant
    --classifier=discriminant: the classes of a domain_incremental stream have one classifier; use
    trained
--dataset=mnist
    --scenario=domain_incremental: dataset=mnist has no domains; use scenario=class_incremental
--stored_size=8
    --stored_size=8: dataset=digits has images of one size; use 0
--pretrained=x.npz
    --pretrained=x.npz: is for a transformer; name its architecture with model

# train: presets and flagfiles
--preset=x
    --preset=x: must be one of cifar100_10, cifar100_10_vit_tiny, ...
--preset
    --preset=: must be one of cifar100_10, cifar100_10_vit_tiny, ...
--flagfile={nothing}
    flagfile: Unable to open flagfile: [Errno 2] No such file or directory: '{nothing}'; give the
    path of a readable file
--flagfile={empty_folder}
    flagfile: Unable to open flagfile: [Errno 21] Is a directory: '{empty_folder}'; give the path of
    a readable file
--flagfile={flagfile_with_an_unknown_flag}
    Unknown command line flag 'epoch'. Did you mean: epoch_repeats, epochs ?; --help lists the flags
    and what they take

# train: models that do not fit
--model=vit --patch_size=3
    --image_size=0: patch_size=3 must divide the image of 8 x 8 pixels
--model=vit --num_heads=5
    --num_heads=5: must divide width=64
--adapter=lora --lora_rank=0
    --lora_rank=0: must be at least 1
--adapter=lora --lora_rank=65
    --lora_rank=65: must lie in 1..64, the smaller side of hidden_0/kernel
--adapter=lora --lora_pattern=hiden.*
    --lora_pattern='hiden.*': must match the whole path of a leaf and matches none; the nearest are
    hidden_1/bias, hidden_0/bias, hidden_1/kernel
--adapter=lora --lora_pattern=(
    --lora_pattern='(': not a regular expression (...)

# train: class counts that do not fit
{classes} --num_tasks=11
    --num_tasks=11: 10 classes are left, and every task needs at least one; choose 1..10 tasks
{classes} --num_tasks=4 --base_classes=8
    --num_tasks=4: 2 classes are left after base_classes=8, and every task needs at least one;
    choose 1..3 tasks
{classes} --num_tasks=6
    --num_tasks=6: leaves a task with one class, whose loss over its own classes is constant; use
    fewer tasks
{classes} --train_per_class=1
    --dataset=digits: the task of classes 2, 3, 4, 6, 7 has no class of two training examples, of
    which one is held out for validation; add some, or use fewer tasks
{classes} --dataset={labels_of_one_class}
    --num_tasks=2: 1 classes are left, and every task needs at least one; choose 1..1 tasks
{classes} --dataset={labels_that_leave_out_class_2}
    --dataset=images: class 2 of 4 has no training example; number the classes from 0 on without
    gaps
{classes} --dataset={labels_of_the_test_data_that_are_new}
    --dataset=images: class 4 of 5 has no training example; number the classes from 0 on without
    gaps
{classes} --dataset={one_image_of_each_class}
    --dataset=images: the task of classes 0, 2 has no class of two training examples, of which one
    is held out for validation; add some, or use fewer tasks

# train: data sets
{classes} --dataset=mnists
    --dataset=mnists: is not in the catalogue of tensorflow-datasets, nor 'digits' or the path of an
    .npz
{classes} --dataset=imagenet_r --data_dir=/nonexistent
    --dataset=imagenet_r: is not prepared in ...; prepare it with: tfds build imagenet_r ...
{classes} --dataset=cifar10 --data_dir={text_file}
    --dataset=cifar10: is not prepared in ...; prepare it with: tfds build cifar10 ...
{classes} --dataset={nothing}.npz
    --dataset={nothing}.npz: there is no such file
{classes} --dataset={link_to_itself}.npz
    --dataset={link_to_itself}.npz: there is no such file
{classes} --dataset={folder_named_npz}
    --dataset={folder_named_npz}: there is no such file
{classes} --dataset={empty_npz}
    --dataset={empty_npz}: cannot be read (EOFError: ...); write it anew with numpy.savez, without
    objects
{classes} --dataset={images_cut_short}
    --dataset={images_cut_short}: cannot be read (BadZipFile: ...); write it anew with numpy.savez,
    without objects
{classes} --dataset={pickled_objects}
    --dataset={pickled_objects}: cannot be read (ValueError: Object arrays cannot be loaded ...);
    write it anew with numpy.savez, without objects
{classes} --dataset={images_with_nan}
    --dataset={images_with_nan}: x_train is float32 (24, 8, 8); it must be uint8 [N, H, W] or ...
{classes} --dataset={images_as_numbers_from_0_to_1}
    --dataset={images_as_numbers_from_0_to_1}: x_train is float32 (24, 8, 8); it must be uint8 [N,
    H, W] or ...
{classes} --dataset={images_as_lists_of_pixels}
    --dataset={images_as_lists_of_pixels}: x_train is uint8 (24, 64); it must be uint8 [N, H, W] or
    ...
{classes} --dataset={images_of_no_pixels}
    --dataset={images_of_no_pixels}: x_train is uint8 (24, 0, 8); it must be uint8 [N, H, W] or ...
{classes} --dataset={images_of_two_sizes}
    --dataset={images_of_two_sizes}: x_train and x_test have images of different shapes
{classes} --dataset={images_without_test_labels}
    --dataset={images_without_test_labels}: lacks y_test; write all of x_train, y_train, x_test,
    y_test
{classes} --dataset={no_test_images}
    --dataset={no_test_images}: x_test is uint8 (0, 8, 8); it must be uint8 [N, H, W] or ...
{classes} --dataset={labels_with_nan}
    --dataset={labels_with_nan}: y_train is float64 (24,); it must hold a whole number from 0 on for
    ...
{classes} --dataset={labels_with_infinity}
    --dataset={labels_with_infinity}: y_test is float64 (24,); it must hold a whole number from 0 on
    for ...
{classes} --dataset={labels_below_0}
    --dataset={labels_below_0}: y_train is int64 (24,); it must hold a whole number from 0 on for
    ...
{classes} --dataset={fewer_labels_than_images}
    --dataset={fewer_labels_than_images}: y_train is int64 (23,); it must hold a whole number from 0
    on for ...
{classes} --dataset={texts}
    --dataset={texts}: x_train is <U6 (24,); it must be uint8 [N, H, W] or ...
{classes} --dataset={a_name_that_is_too_long}.npz
    {a_name_that_is_too_long}.npz: the name is too long; choose another
{vit} --dataset={images_of_5_channels} --pretrained={weights}
    --dataset=images: has images of 5 channels; a pre-trained model takes 1 (grey), 2 (grey, alpha),
    3 (RGB) or 4 (RGB, alpha)

# train: weights to start from
{vit} --pretrained={nothing}.npz
    --pretrained={nothing}.npz: there is no such file
{vit} --pretrained={text_file}
    --pretrained={text_file}: must end in .safetensors or .npz
{vit} --pretrained={folder_named_safetensors}
    --pretrained={folder_named_safetensors}: there is no such file
{vit} --pretrained={empty_safetensors}
    --pretrained={empty_safetensors}: cannot be read (SafetensorError: ...); get it anew
{vit} --pretrained={weights_cut_short}
    --pretrained={weights_cut_short}: cannot be read (SafetensorError: ...); get it anew
{vit} --pretrained={pickled_weights}
    --pretrained={pickled_weights}: cannot be read (ValueError: Object arrays cannot be loaded ...);
    get it anew
{vit} --pretrained={weights_with_nan}
    --pretrained={weights_with_nan}: does not fit the model: not finite blocks.0.attn.qkv.weight;
    choose the architecture ..., or get them anew
{vit} --pretrained={weights_with_infinity}
    --pretrained={weights_with_infinity}: does not fit the model: not finite
    blocks.0.attn.qkv.weight; choose the architecture ..., or get them anew
{vit} --pretrained={weights_of_whole_numbers}
    --pretrained={weights_of_whole_numbers}: does not fit the model: not of floating-point numbers
    blocks.0.attn.qkv.weight; choose the architecture ..., or get them anew
{vit} --pretrained={weights_without_a_kernel}
    --pretrained={weights_without_a_kernel}: does not fit the model: missing
    blocks.0.mlp.fc1.weight; choose the architecture ..., or get them anew
{vit} --pretrained={weights_under_other_names}
    --pretrained={weights_under_other_names}: its tensors (fc.weight) are not named in a known
    layout: timm has ...; give weights of one of them
{vit} --pretrained={weights} --width=32
    --pretrained={weights}: does not fit the model: misshapen cls_token gives (1, 1, 16) for
    cls_token of (1, 1, 32), ...; choose the architecture ..., or get them anew

# train: texts
{text} --dataset={texts}
    --tokenizer=: model=text_encoder needs one; give the path of its tokenizer.json
{text} --dataset={texts} --tokenizer={nothing}
    --tokenizer={nothing}: there is no such file; give the tokenizer.json of the model
{text} --dataset={texts} --tokenizer={empty_folder}
    --tokenizer={empty_folder}: there is no such file; give the tokenizer.json of the model
{text} --dataset={texts} --tokenizer={text_file}
    --tokenizer={text_file}: cannot be read (...); give the tokenizer.json of the model
{text} --dataset={texts} --tokenizer={tokenizer_cut_short}
    --tokenizer={tokenizer_cut_short}: cannot be read (...); give the tokenizer.json of the model
{text} --dataset={texts} --tokenizer={tokenizer} --vocabulary=3
    --vocabulary=3: the tokenizer gives ids up to 5; raise the vocabulary or give the tokenizer of
    the model
{text} --dataset={texts} --tokenizer={tokenizer} --max_tokens=513
    --max_tokens=513: must be at most 512, the positions of the model
{text} --dataset={texts} --tokenizer={tokenizer} --class_order=groups
    --class_order=groups: the data set names no groups of classes; use random or given
{text} --dataset={texts} --tokenizer={tokenizer} --num_tasks=5
    --num_tasks=5: 4 classes are left, and every task needs at least one; choose 1..4 tasks
{text} --dataset={texts_as_bytes} --tokenizer={tokenizer}
    --dataset={texts_as_bytes}: x_train is |S6 (24,); a text model needs strings [N]
{text} --dataset={images} --tokenizer={tokenizer}
    --dataset={images}: x_train is uint8 (24, 8, 8); a text model needs strings [N]
{text} --dataset=digits --tokenizer={tokenizer}
    --model=text_encoder: reads texts and dataset=digits has images; choose a dataset of texts

# train: work directories
--workdir=
    --workdir=: needs a directory, as --workdir=runs/digits
--workdir={text_file}
    --workdir={text_file}: is not a directory; choose another path
--workdir={text_file}/below
    --workdir={text_file}/below: cannot be written (Not a directory); choose another directory
--workdir=/proc/pm_jax
    --workdir=/proc/pm_jax: cannot be written (No such file or directory); choose another directory
--workdir={link_to_nothing}
    --workdir={link_to_nothing}: is not a directory; choose another path
--workdir={link_to_itself}
    --workdir={link_to_itself}: is not a directory; choose another path
--workdir={a_name_that_is_too_long}
    --workdir={a_name_that_is_too_long}: cannot be read (File name too long); choose another
    directory
--workdir={folder_of_something_else}
    --workdir={folder_of_something_else}: is not empty and holds no run of this program; choose
    another directory
--workdir={run_with_damaged_settings}
    --workdir={run_with_damaged_settings}: its config.json is damaged; choose another directory
--workdir={run_with_empty_settings}
    --workdir={run_with_empty_settings}: its config.json is damaged; choose another directory
--workdir={run_whose_settings_are_a_folder}
    --workdir={run_whose_settings_are_a_folder}: cannot be read (Is a directory); choose another
    directory
--workdir={run_of_7_epochs}
    --workdir={run_of_7_epochs}: holds a run with epochs=7, not 3; choose another directory or the
    same flags
--workdir={finished} {tiny} --learning_rate=0.5 --batch_size=16
    --workdir={finished}: holds a run with batch_size=32, not 16; learning_rate=0.003, not 0.5;
    choose another directory or the same flags
--workdir={finished}/seed_0 {tiny}
    --workdir={finished}/seed_0: is not empty and holds no run of this program; choose another
    directory
--branch_from={nothing} --from_task=1
    --branch_from={nothing}: config.json cannot be read; give the work directory of a run of ...
--branch_from={run_with_damaged_settings} --from_task=1
    --branch_from={run_with_damaged_settings}: config.json cannot be read; give the work directory
    of a run of ...
--branch_from={run_of_7_epochs} --from_task=1
    --branch_from={run_of_7_epochs}: is a run with epochs=7, not 3; a branch may have another rule,
    curvature or perturbation only
--branch_from={finished} --from_task=1 {tiny}
    --from_task=1: seed_0 in {finished} has no model of task 1; take a run that was trained with
    keep_task_models, and an earlier task

# train: exports
{vit} --export={nothing}.bin
    --export={nothing}.bin: must end in .safetensors
{vit} --export={nothing}/model.safetensors
    --export={nothing}/model.safetensors: the folder {nothing} does not exist; make it
{vit} --export=/proc/model.safetensors
    --export=/proc/model.safetensors: the folder /proc cannot be written (...); choose another
{vit} --export={folder_named_safetensors} --overwrite
    --export={folder_named_safetensors}: is a folder already; choose another name
{vit} --export={weights}
    --export={weights}: exists; choose another name or set overwrite
{vit} --export={weights} --pretrained={weights} --overwrite
    --export={weights}: is what the run starts from; choose another name
{vit} --export={nothing}.safetensors --seeds=1,2
    --export={nothing}.safetensors: takes the model of one seed; give one of seeds=1,2 a call, which
    does not train a finished run again
--export={nothing}.safetensors
    --model=mlp: has no public layout to be exported in; use a ViT
{vit} --export_adapter={nothing}
    --export_adapter={nothing}: needs adapter=lora and pretrained; export writes the whole model
{vit} --export_adapter={nothing} --adapter=lora
    --export_adapter={nothing}: needs adapter=lora and pretrained; export writes the whole model
{vit} --export_adapter={nothing}.safetensors
    --export_adapter={nothing}.safetensors: is a folder of two files; leave the ending out
{vit} --export_adapter={text_file}
    --export_adapter={text_file}: is a file already; choose another name

# compare: rules and their settings
--rules=
    --rules=: needs one or more, or all
--rules=sequential,nonsense
    --rules=nonsense: rule=nonsense: must be one of perturb_and_merge, ...
--rules=perturb_and_merge+keep=3
    --rules=perturb_and_merge+keep=3: rule_settings=keep=3: keep is not a setting of the rule;
    perturb_and_merge takes clip=true, ... by default
--rules=perturb_and_merge+clip=7
    --rules=perturb_and_merge+clip=7: rule_settings=clip=7: must be true or false; perturb_and_merge
    takes clip=true, ... by default
--rules=averaging+epochs=many
    --rules=averaging+epochs=many: epochs=many: invalid literal for int() with base 10: 'many'
--rules=averaging+epochs=0
    --rules=averaging+epochs=0: epochs=0: must be at least 1
--rules=averaging --rule_settings=clip=false
    --rule_settings=clip=false: belongs to one rule; write it after the rule's name, as
    --rules=perturb_and_merge+clip=false
--rules=perturb_and_merge --curvature=identity,nonsense
    --rules=perturb_and_merge+curvature=nonsense: curvature=nonsense: must be one of
    fisher_empirical, fisher_exact, ...
--rules=fisher_averaging --curvature=identity,kronecker
    --rules=fisher_averaging+curvature=kronecker: curvature=kronecker: rule=fisher_averaging takes
    curvature entry by entry; use fisher_exact, or perturb_and_merge or became

# compare: what it shares with train
--rules=averaging --seeds=
    --seeds=: needs one or more whole numbers from 0 to 4294967295
--rules=averaging --workdir=
    --workdir=: needs a directory, as --workdir=runs/rules
--rules=averaging --workdir={text_file}
    --workdir={text_file}: is not a directory; choose another path
--rules=averaging --workdir={link_to_nothing}
    --workdir={link_to_nothing}: is not a directory; choose another path
--rules=averaging --workdir={comparison_of_something_else}
    --workdir={comparison_of_something_else}: is not empty and holds no run of this program; choose
    another directory
--rules=averaging --workdir={finished}
    --workdir={finished}: is not empty and holds no run of this program; choose another directory
--rules=averaging --model=vit --patch_size=3
    --image_size=0: patch_size=3 must divide the image of 8 x 8 pixels
--rules=averaging {classes} --dataset={labels_with_nan}
    --dataset={labels_with_nan}: y_train is float64 (24,); it must hold a whole number from 0 on for
    ...
--rules=averaging {vit} --pretrained={weights_with_nan}
    --pretrained={weights_with_nan}: does not fit the model: not finite blocks.0.attn.qkv.weight;
    choose the architecture ..., or get them anew

# merge: files
--base= {output}
    --base=: needs a .safetensors file
--base={model} --models= {output}
    --models=: needs one or more files
{two}
    --output=: needs a .safetensors file
--base={nothing}.safetensors --models={model} {output}
    --base={nothing}.safetensors: there is no such file
--base={model} --models={text_file} {output}
    --models={text_file}: must end in .safetensors
--base={damaged_model} --models={model} {output}
    --base={damaged_model}: cannot be read (SafetensorError: ...); get it anew
--base={empty_safetensors} --models={model} {output}
    --base={empty_safetensors}: cannot be read (SafetensorError: ...); get it anew
--base={empty_folder} --models={model} {output}
    --base={empty_folder}: cannot be read as a checkpoint of Orbax (AttributeError); give the folder
    of one saved tree
--base={model} --models={model_with_nan} {output}
    --models={model_with_nan}: scale holds nan; merge a checkpoint from before it diverged
--base={model_with_infinity} --models={model} {output}
    --base={model_with_infinity}: scale holds -inf; merge a checkpoint from before it diverged
--base={model} --models={model_of_another_shape} {output}
    --models={model_of_another_shape}: does not hold the tensors of the base: scale is [2], not [3];
    give files of one architecture
--base={model} --models={model_with_a_tensor_more} {output}
    --models={model_with_a_tensor_more}: does not hold the tensors of the base: also has extra; give
    files of one architecture
{two} --output={nothing}.bin
    --output={nothing}.bin: must end in .safetensors
{two} --output={nothing}/model.safetensors
    --output={nothing}/model.safetensors: the folder {nothing} does not exist; make it
{two} --output=/proc/model.safetensors
    --output=/proc/model.safetensors: the folder /proc cannot be written (...); choose another
{two} --output={model} --overwrite
    --output={model}: is one of the inputs; choose another name
--run={nothing} {output}
    --run={nothing}: holds no task models; give the seed_<n> of a run that was trained with
    keep_task_models
--run={finished}/seed_0 {output}
    --run={finished}/seed_0: holds no task models; give the seed_<n> of a run that was trained with
    keep_task_models

# merge: settings
{two} {output} --rule=none
    --rule=none: must be one of perturb_and_merge, ...
{two} {output} --rule_settings=speed=2
    --rule_settings=speed=2: speed is not a setting of the rule; averaging takes no settings
{two} {output} --rule=ties --settings=.*mlp:keep=2
    --rule_settings=keep=2.0: must be in (0, 1]; ties takes scale=0.55, keep=0.2, trim=global by
    default
{two} {output} --settings=.*head.*:a=1
    --settings=.*head.*:a=1: pattern='.*head.*': must match the whole path of a leaf and matches
    none; the nearest are blocks.0.mlp, scale
{two} {output} --settings=a=1
    --settings=a=1: must read PATTERN:name=value,...
{two} {output} --settings=(:a=1
    --settings=(:a=1: pattern='(': not a regular expression (...)
{two} {output} --rule=perturb_and_merge
    --rule=perturb_and_merge: needs curvature; give fishers, a file for each model
{two} {output} --rule=perturb_and_merge --fishers={fishers_below_0}
    --fishers={fishers_below_0}: scale holds -1.0; must not be negative
{two} {output} --fishers={model}
    --fishers={model}: rule=averaging reads none; leave them out
{two} {output} --fishers=a,b,c
    --fishers=a,b,c: needs one for each of 1 models, in their order
{two} {output} --seed=-1
    --seed=-1: needs one or more whole numbers from 0 to 4294967295
{two} {output} --rule=tunable_magmax --rule_settings=preference=0.5:0.5
    --rule_settings=preference=0.5:0.5: must be 1 weights, one for each task; tunable_magmax takes
    scale=0.5, preference= by default

# inspect: what it is given
(no arguments)
    DIR: is missing; name one, as experiments.inspect runs/digits
/nonexistent
    DIR=/nonexistent: is no directory; give the work directory of a run of ...
{empty_folder}
    DIR={empty_folder}: holds no run; give the work directory of a run of ...
{text_file}
    DIR={text_file}: is no directory; give the work directory of a run of ...
{link_to_itself}
    DIR={link_to_itself}: is no directory; give the work directory of a run of ...
{finished}/seed_0
    DIR={finished}/seed_0: holds no run; give the work directory of a run of ...
{finished} more
    'more': not a flag; settings are given as --name=value
--nonsense=1 {finished}
    Unknown command line flag 'nonsense'; --help lists the flags and what they take

# report: what it is given
(no arguments)
    --workdir=: needs that of a run, as --workdir=runs/digits
--workdir={nothing}
    --workdir={nothing}: has no config.json; give the work directory of a run of ...
--workdir={text_file}
    --workdir={text_file}: has no config.json; give the work directory of a run of ...
--workdir={run_with_damaged_settings}
    --workdir={run_with_damaged_settings}: its config.json is damaged; take another directory
--workdir={run_whose_settings_are_a_folder}
    --workdir={run_whose_settings_are_a_folder}: ...config.json cannot be read or written (Is a
    directory); set its permissions right, make room or move it away
--workdir={run_of_7_epochs}
    --workdir={run_of_7_epochs}: has no finished seed; run the command that made it to its end
--workdir={link_to_nothing}
    --workdir={link_to_nothing}: has no config.json; give the work directory of a run of ...

"""

# The same from outside, of the programs that a process can have one of; whole processes.
PROCESSES = """
# train: a name that is not known
--rule=nonsense
    --rule=nonsense: must be one of perturb_and_merge, ...
# studies.ablation: settings of which the last is wrong
--workdir={new} --arms=sequential --learning_rates=0.1,0
    --learning_rate=0.0: must be above 0
# studies.merging_map: a name that is not known
--workdir={new} --rules=sequential,x
    --rules=x: must be one of sequential, averaging, merge only, perturb and merge
"""

# Inputs whose fault shows during the run: code 1, with what was saved.
DURING = """
# train: a rate at which training diverges
{tiny} --optimizer=sgd --learning_rate=1e38
    task 1, step ...; lower learning_rate=1e+38 or set clip_norm, in another work directory; what
    was saved is kept in {new}/seed_0
# compare: the same, which names the rule
--rules=averaging {tiny} --optimizer=sgd --learning_rate=1e38
    averaging: task 1, step ...; lower learning_rate=1e+38 or set clip_norm, in another work
    directory; what was saved is kept in {new}/averaging/seed_0
# train: a file where the run of a seed belongs
{tiny} --workdir={run_with_a_file_for_seed_1} --seeds=1
    --workdir={run_with_a_file_for_seed_1}: {run_with_a_file_for_seed_1}/seed_1: cannot be written
    or read (File exists); set right what is there; the same command goes on from what was saved
"""

# What a machine does while {tiny} runs, from `faults.py`: code 1, and when it is over the same
# command goes on and ends with the results of a run that nothing happened to.
FAULTS = """
# train: disks
the disk is full when the settings are written
    --workdir={new}: cannot be written (No space left on device); choose another directory
the disk is full when a line of the log is written
    --workdir={new}: cannot be written or read (No space left on device); make room there; the same
    command goes on from what was saved
the disk is full when a checkpoint is written
    --workdir={new}: ...: cannot be written or read (No space left on device); make room there; the
    same command goes on from what was saved
the disk is full when the checksums of a checkpoint are written
    --workdir={new}: cannot be written or read (No space left on device); make room there; the same
    command goes on from what was saved
the disk is full when the results are written
    --workdir={new}: cannot be written or read (No space left on device); make room there; the same
    command goes on from what was saved
the disk is full when the summary is written
    --workdir={new}: cannot be written or read (No space left on device); make room there; the same
    command goes on from what was saved
the quota is used up when the results are written
    --workdir={new}: cannot be written or read (Disk quota exceeded); make room there; the same
    command goes on from what was saved
the disk fails when the results are written
    --workdir={new}: cannot be written or read (Input/output error); set right what is there; the
    same command goes on from what was saved
# train: memory
the device has no memory left in task 2
    out of memory (JaxRuntimeError: RESOURCE_EXHAUSTED: Out of memory allocating 4000 bytes.); set
    resident_mb, which is 0.0, or take a smaller model or batch_size than 32 in another work
    directory; the same command goes on from what was saved
the host has no memory left after task 1
    out of memory (MemoryError:); set resident_mb, ...; the same command goes on from what was
    saved
# train: numbers
the merge of task 2 gives nan
    task 2, merge: params/head/bias is not finite; lower learning_rate=0.003 or set clip_norm, in
    another work directory; what was saved is kept in {new}/seed_0
the measured loss of task 2 is infinite
    task 2, step 36: the loss is inf; lower learning_rate=0.003 or set clip_norm, in another work
    directory; what was saved is kept in {new}/seed_0
"""

# What looks odd, and is accepted.
ACCEPTED = """
# train: good files, which those above differ from in one thing
{classes} --dataset={images} --dry_run
{vit} --dataset={images} --pretrained={weights} --dry_run
{text} --dataset={texts} --tokenizer={tokenizer} --dry_run
# train: names with spaces, quotes and letters of other scripts
{classes} --dataset={images_in_a_folder_that_is_oddly_named} --dry_run
--flagfile={flagfile_that_is_oddly_named} --dry_run
{tiny} --workdir={oddly_named_folder}
# train: links
{tiny} --workdir={link_to_an_empty_folder}
{tiny} --workdir={link_to_finished}
# train: the same twice
{tiny} --workdir={finished} --seeds=0,0
--epochs=0 --epochs=3 --dry_run
# merge: odd names and links
{two} --output={oddly_named_folder}/merged.safetensors
--base={link_to_a_model} --models={model} --output={nothing}.safetensors
# inspect: odd names and links
{finished}
{link_to_finished}
"""

SHORT = {
    "tiny": "--num_tasks=2 --epochs=1 --first_task_epochs=1 --hidden_sizes=8 --rule=averaging "
    "--perturbation=none",
    "classes": "--scenario=class_incremental --num_tasks=2",
    "vit": "{classes} --model=vit --patch_size=4 --width=16 --depth=1 --num_heads=2",
    "text": "{classes} --model=text_encoder --width=16 --depth=1 --num_heads=2 --vocabulary=6",
    "two": "--base={model} --models={model}",
    "output": "--output={nothing}.safetensors",
}
ROOT = pathlib.Path(__file__).parents[2]


class Row(NamedTuple):
    """What is typed, and the line that answers."""

    binary: str
    typed: str
    answer: str


def rows(table):
    """The rows of a table, as parameters of a test."""
    found, binary = [], ""
    for line in filter(None, table.split("\n")):
        if line.startswith("# "):
            binary = line[2:].split(":")[0]
        elif line.startswith("    "):
            *others, last = found
            found = [*others, last._replace(answer=f"{last.answer} {line.strip()}".strip())]
        else:
            found.append(Row(binary, line, ""))
    return [pytest.param(row, id=f"{row.binary} {row.typed}") for row in found]


class Told(NamedTuple):
    """A row with its files made."""

    arguments: list[str]
    answer: re.Pattern


def told(row, folder, finished):
    typed = row.typed.replace("(no arguments)", "")
    if row.binary in ("train", "compare") and "--workdir" not in typed:
        typed = f"--workdir={{new}} {typed}"
    while any(f"{{{name}}}" in typed for name in SHORT):
        for name, stands_for in SHORT.items():
            typed = typed.replace(f"{{{name}}}", stands_for)
    paths = {"new": folder / "new", "finished": finished}
    for name in re.findall(r"{(\w+)}", typed):
        if name == "link_to_finished":
            paths[name] = folder / name
            paths[name].symlink_to(finished)
        elif name not in paths:
            paths[name] = getattr(bad_files, name)(folder)
    arguments = shlex.split(
        typed.format(**{name: shlex.quote(str(path)) for name, path in paths.items()})
    )
    answer = re.sub(r"{(\w+)}", lambda found: str(paths[found[1]]), row.answer)
    pattern = ".*".join(map(re.escape, answer.split("...")))
    return Told(arguments, re.compile(f"error: {pattern}"))


def call(binary, arguments):
    """Parse and run as `app.run` would."""
    if binary in ("merge", "report"):  # have flags of their own
        module, values = {"merge": merge, "report": report}[binary], flags.FlagValues()
        module.define_flags(values)
        return module.main(experiment_flags.parse([binary, *arguments], values), values)
    flags.FLAGS.unparse_flags()
    if binary == "inspect":
        return inspect.main(experiment_flags.parse([binary, *arguments], positional=1))
    module = {"train": train, "compare": compare}[binary]
    return module.main(experiment_flags.parse([binary, *arguments]))


def ended(capsys, row, arguments):
    """Exit code and the lines on standard error."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        call(row.binary, arguments)
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err
    return caught.value.code, err.splitlines()


def content(folder):
    """Everything below a folder: bytes of files, targets of links."""
    found = {}
    for path in folder.rglob("*"):
        if path.is_symlink():
            found[path] = path.readlink()
        else:
            found[path] = None if path.is_dir() else path.read_bytes()
    return found


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "a run, möglichst 好"
    call("train", [f"--workdir={workdir}", "--noreport", *SHORT["tiny"].split()])
    return workdir


def results(workdir):
    return comparable(json.loads((workdir / "seed_0" / "results.json").read_text()))


@pytest.mark.parametrize("row", rows(WRONG))
def test_what_is_wrong_is_one_line_before_anything_is_done(
    row, finished, tmp_path, capsys, monkeypatch
):
    def made(self, *_, **__):
        raise AssertionError("a learner is made")

    if "tokenizer" in row.typed:
        pytest.importorskip("tokenizers")
    arguments, answer = told(row, tmp_path, finished)
    before = content(tmp_path) | content(finished)
    monkeypatch.setattr(Learner, "__init__", made)
    code, lines = ended(capsys, row, arguments)
    assert len(lines) == 1 and answer.fullmatch(lines[0]), (lines, answer.pattern)
    assert code == 2
    assert content(tmp_path) | content(finished) == before
    if "{finished}" in row.typed:
        assert call("inspect", [str(finished)]) == 0


def test_the_finished_run_of_the_tables_is_one_that_can_be_gone_on_with(finished):
    config = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in json.loads((finished / "config.json").read_text()).items()
    }
    learner = Learner(Config(**config), 0, finished / "seed_0", quiet=True)
    assert learner.finished_params()["head"]["bias"].shape == (10,)


@pytest.mark.parametrize("row", rows(PROCESSES))
def test_a_process_ends_so_too(row, tmp_path):
    arguments, answer = told(row._replace(binary=""), tmp_path, None)
    before = content(tmp_path)
    command = [sys.executable, "-m", f"experiments.{row.binary}", *arguments]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 2 and process.stdout == ""
    assert answer.fullmatch(process.stderr.rstrip("\n")), process.stderr
    assert content(tmp_path) == before


@pytest.mark.parametrize("row", rows(DURING))
def test_what_shows_later_is_one_line_and_code_1(row, finished, tmp_path, capsys):
    arguments, answer = told(row, tmp_path, finished)
    code, lines = ended(capsys, row, arguments)
    assert code == 1 and answer.fullmatch(lines[-1]), (lines, answer.pattern)
    assert sum(line.startswith("error: ") for line in lines) == 1
    workdir = next(path.parent for path in tmp_path.rglob("*config.json"))
    assert not inspection.inspect(workdir).damaged and not [*tmp_path.rglob("results.json")]


@pytest.mark.parametrize("row", rows(FAULTS))
def test_a_run_survives_what_a_machine_does(row, finished, tmp_path, capsys, monkeypatch):
    tiny = row._replace(typed="{tiny} --noreport --checkpoint_every=20")
    arguments, answer = told(tiny._replace(answer=row.answer), tmp_path, finished)
    with monkeypatch.context() as patch:
        getattr(faults, row.typed.replace(" ", "_"))(patch)
        code, lines = ended(capsys, tiny, arguments)
    assert code == 1 and answer.fullmatch(lines[-1]), (lines, answer.pattern)
    assert sum(line.startswith("error: ") for line in lines) == 1
    if (tmp_path / "new" / "config.json").exists():
        assert not inspection.inspect(tmp_path / "new").damaged
    call("train", arguments)
    assert results(tmp_path / "new") == results(finished)
    assert not inspection.inspect(tmp_path / "new").damaged


def test_a_disk_that_is_really_full(finished, tmp_path):
    """One of 200 kB in memory, which takes a namespace of its own and the right to mount."""
    answer = (
        "--workdir={new}: cannot be written or read (...No space left on device...); make room "
        "there; the same command goes on from what was saved"
    )
    arguments, pattern = told(
        Row("train", "{tiny} --noreport --checkpoint_every=20", answer), tmp_path, finished
    )
    disk = tmp_path / "new"
    disk.mkdir()
    script = (
        'mount -t tmpfs -o size=200k tmpfs "$0" || exit 99; "$@"; code=$?; '
        'cp -R "$0" "$0.kept"; exit $code'
    )
    command = ["unshare", "-m", "sh", "-c", script, str(disk), sys.executable]
    try:
        process = subprocess.run(
            [*command, "-m", "experiments.train", *arguments],
            cwd=ROOT, capture_output=True, text=True,
        )  # fmt: skip
    except FileNotFoundError:
        pytest.skip("needs unshare")
    if process.returncode == 99 or process.stderr.startswith("unshare: "):
        pytest.skip("needs the right to mount")
    assert process.returncode == 1 and "Traceback" not in process.stderr, process.stderr
    assert pattern.fullmatch(process.stderr.splitlines()[-1]), process.stderr
    kept = tmp_path / "new.kept"
    assert not inspection.inspect(kept).damaged and not [*kept.rglob("results.json")]
    call("train", [f"--workdir={kept}", *arguments[1:]])
    assert results(kept) == results(finished)


def test_a_merge_on_a_full_disk_leaves_nothing_and_can_be_repeated(tmp_path, capsys, monkeypatch):
    answer = "--output={nothing}.safetensors: cannot be written (No space left on device); ..."
    row = Row("merge", "{two} {output}", answer)
    arguments, pattern = told(row, tmp_path, None)
    before = content(tmp_path)
    with monkeypatch.context() as patch:
        faults.the_disk_is_full_when_the_merged_model_is_written(patch)
        code, (line,) = ended(capsys, row, arguments)
    assert code == 1 and pattern.fullmatch(line) and content(tmp_path) == before
    call("merge", arguments)
    assert (tmp_path / "nothing.safetensors").exists()


def test_a_work_directory_that_another_process_runs_in(finished, tmp_path, capsys):
    answer = "--workdir={finished}: another process runs in it; wait for its end or choose ..."
    row = Row("train", "{tiny} --noreport --workdir={finished}", answer)
    arguments, pattern = told(row, tmp_path, finished)
    before = content(finished)
    with held(finished):
        code, (line,) = ended(capsys, row, arguments)
    assert code == 2 and pattern.fullmatch(line) and content(finished) == before
    call("train", arguments)
    assert "already finished" in capsys.readouterr().out


def test_clocks_that_are_set_back_change_no_result(finished, tmp_path, monkeypatch):
    start, readings = time.time(), []

    def earlier():
        readings.append(1)
        return start - 1000.0 * len(readings)

    arguments = [f"--workdir={tmp_path}", "--noreport", *SHORT["tiny"].split()]
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", earlier)
        patch.setattr(time, "perf_counter", earlier)
        call("train", arguments)
    assert len(readings) > 10 and results(tmp_path) == results(finished)
    seconds = json.loads((tmp_path / "seed_0" / "results.json").read_text())["seconds"]
    assert set(seconds.values()) == {0.0}
    lines = (tmp_path / "seed_0" / "metrics.jsonl").read_text().splitlines()
    epochs = [line for line in map(json.loads, lines) if line["event"] == "epoch"]
    assert [line["images_per_second"] for line in epochs] == [None] * 2
    assert not inspection.inspect(tmp_path).damaged


@pytest.mark.parametrize("row", rows(ACCEPTED))
def test_what_looks_odd_and_is_right_is_accepted(row, finished, tmp_path, capsys):
    if "tokenizer" in row.typed:
        pytest.importorskip("tokenizers")
    arguments, _ = told(row, tmp_path, finished)
    arguments += ["--noreport"] if row.binary == "train" else []
    assert not call(row.binary, arguments)
    assert "error" not in capsys.readouterr().err
    if "{tiny}" in row.typed:
        (workdir,) = (each[10:] for each in arguments if each.startswith("--workdir="))
        assert results(pathlib.Path(workdir)) == results(finished)
