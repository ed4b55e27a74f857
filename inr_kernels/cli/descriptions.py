"""What the help of each command says before its options. Imports nothing."""

DESCRIPTION = (
    "Enlarge pictures, fill their holes, also on a web page, measure quality, train and export networks, show what this"
    " machine runs, prove kernels on this machine's GPU, or compare speed and quality in a demo."
)

UPSCALE = """\
Render an image at a larger size, by any factor.

  inr-kernels upscale in.png --scale 3.7 -o out.png
  inr-kernels upscale in.png --size 1920x1080 -o out.png
  inr-kernels upscale photos --scale 2 -o large

Of a folder, a pattern or several images, each is written into the folder -o under its own name. A file of that name
counts as finished and is skipped, so that an interrupted command can be started again. Errors are listed at the
end, when the rest is done; the exit status is then 1. With torchrun, each process takes its share:
torchrun --nproc-per-node 2 -m inr_kernels upscale photos --scale 2 -o large.

Reads PNG, JPEG, WebP, TIFF, BMP, GIF, AVIF, JPEG 2000, PPM, TGA and ICO (and HEIC with pillow-heif); writes PNG, JPEG,
WebP, TIFF or BMP, as the suffix of the output or --format says. Greyscale, transparency (upscaled bicubically), 16 bits
(in PNG, and in TIFF without colour), colour profiles, resolution, EXIF, XMP and text are kept where the format can hold
them; a line on stderr names what it cannot. Images are rotated as their EXIF orientation says.

The name "-" is the standard input or output. Pipes and devices are read once, and written in place."""

INPAINT = """\
Fill the missing pixels of an image, optionally at a larger size.

  inr-kernels inpaint in.png --mask mask.png -o out.png
  inr-kernels inpaint in.png --mask mask.png --scale 2.5 -o large.png
  inr-kernels inpaint in.png --mask mask.png --model big-lama.pt --refine -o out.png
  inr-kernels inpaint photos --mask masks -o filled

The mask is an image of the same size: white pixels are filled, black ones are kept; grey counts as white from 128 (of
255) on. At the input's size the kept pixels do not change (in PNG, BMP and, except for 16-bit colour, TIFF).
Strokes on a transparent layer work, too: the mask is brightness times opacity.
Folders, formats, greyscale, transparency, 16 bits, colour profiles, the name "-" and pipes: as in `inr-kernels
upscale`. Of a folder's images, each has the mask of its name, which may end in _mask or _mask000 and have another
format, or all have the same.

Networks, --model:

  dear    the better of the two that ship, and the one for larger sizes. Every known pixel attends to every pixel, as
          in the paper: twice the pixels take four times as long. For large images, --hd-strategy crop computes the
          surroundings of the holes only; with --tile 32 pixels attend to their surroundings only.
  in2     several times faster: it sees the whole image at once, in time proportional to the number of pixels.
          Sides of at least 3 pixels. It fills at the input's size only.
  PATH    a checkpoint of DEAR, IN2, ImplicitAutoencoder or LaMa: a .safetensors file of this package, or a file of
          LaMa as others publish it, such as big-lama.pt or a .ckpt. The last two fill at the input's size only.

With --refine, large holes in large images get the structure that the network finds at a small size. It takes about 30
times as long, at the input's size only, and is meant for LaMa.

Both networks that ship are small and were trained on a few photographs: use them for scratches and strokes, not for
whole objects."""

APP = """\
Show a web page on which to paint over what is to be filled, and to enlarge pictures.

  inr-kernels app
  inr-kernels app --model big-lama.pt --port 8080

Open the printed address in a browser. Load, drop or paste a picture, paint its mask, choose a network, compare the
result with the input, and download it in the input's format. The page computes what `inr-kernels inpaint` and
`inr-kernels upscale` write, and shows that command line.

The page is for this machine alone, unless --host says otherwise; there is no password. One picture is computed at a
time, the others wait. Pictures are kept in a temporary folder until the command ends. Nothing is loaded from or sent
to other machines. Needs pip install 'inr-kernels[app]'."""

EXPORT = """\
Write a network as an ONNX file, for ONNX Runtime and others.

  inr-kernels export --model big-lama.pt -o lama.onnx

Images are [1, 3, height, width], float32, in [0, 1]. Networks that fill holes take image and mask [1, 1, height,
width], 1 = fill; LIIF takes image and size, two int64: the output's height and width. Height and width stay open,
unless --size fixes them. The file has standard operators only (opset 20). This takes up to some minutes, and needs
pip install 'inr-kernels[onnx]'."""

EVALUATE = """\
Measure the quality of networks, or of another program's pictures, on folders of pictures.

  inr-kernels evaluate --model dear --model in2 --data DIR --masks strokes -o OUT
  inr-kernels evaluate --model liif --data DIR --scales 2,3.7,8
  inr-kernels evaluate --pred FILLED --target DIR --masks MASKS --convention lama
  inr-kernels evaluate --model my.safetensors --data DIR --preset in2

Prints a table with PSNR (also of the missing pixels alone), SSIM and L1 of each method and of baselines: mean colour,
smooth fill, Telea's method (with OpenCV), bicubic and nearest-neighbour interpolation. With -o it also writes table.md,
table.csv, the values of each picture in pictures.csv, and plot.png. Folders are searched with their subfolders.
Pictures, masks and predictions belong together if they have one name; a mask or prediction may add _mask000 to it.
What is missing or damaged is named on stderr, and the rest goes on.

Kinds of masks, --masks: thin, medium, thick: LaMa's test masks; mixed, box: of its training; strokes: over 20 to 30 %
of the picture ("strokes:15" over 15 %, "strokes:5-40" over 5 to 40 %); noise: single pixels, 10 to 90 % of them.

Conventions, --convention, of published tables:

  plain        RGB in 8 bits, as a file holds it
  liif         LIIF's benchmarks: luminance, without a border of the scale
  liif-div2k   RGB, without a border of scale + 6 pixels
  lama         8 bits by truncation, SSIM with zero padding, LPIPS of VGG-16, input padded to multiples of 8
  coordfill    8 bits by truncation, SSIM of scikit-image with a window of 11 pixels, LPIPS of AlexNet
  dear, in2    of these papers, as far as they say; in2 follows coordfill

Presets, --preset: in2: the middle of each picture at IN²'s eight sizes (named height × width, as in the paper); dear:
pictures shrunk by DEAR's eight scales. Both draw strokes unless --masks is given, and set the convention.
Needs pip install 'inr-kernels[evaluate]'."""

TRAIN = """\
Train a network on folders of pictures, by a shipped config or an own one.

  inr-kernels train in2_small data=PHOTOS out=RUN steps=20
  inr-kernels train in2_small data=PHOTOS out=RUN steps=20 --resume
  inr-kernels train in2_small --print-config

CONFIG is the name of a shipped config or a YAML file: in2_small, dear_small, liif_small, lte_small, lama_small and
autoencoder for one core, in2_paper, dear_paper and liif_paper as the papers have it. --print-config shows every option,
its value and what it means; key=value changes one, and loss.perceptual=0 one in a group.

Everything is written in the folder `out`: model.safetensors, the result; config.yaml; tensorboard/ with losses and
pictures; checkpoints/, from which --resume continues with the same numbers. Needs pip install
'inr-kernels[train]'."""

INFO = """\
Show this machine, the installed versions, and which implementation of each operator runs here.

Each operator's implementations are listed with the reason if one does not run. On a CPU the first that can run is
used; on a GPU the fastest that `inr-kernels prove` turned on for the call, else the reference. "<-" marks the one that
is used, which the environment variable INR_KERNELS_BACKEND can change; where it depends on the call, none is marked.
"proof" says what `inr-kernels prove` found about it on this device."""

PROVE = """\
Check every kernel on this machine's GPU, and turn on those that are right and faster than plain PyTorch.

  inr-kernels prove
  inr-kernels prove --op local_implicit --dtype bfloat16 --quick
  inr-kernels prove --device cpu
  inr-kernels prove --list

Each operator, implementation, dtype and form of the call is tried in a process of its own, forward and backward:
against float64, twice for the same bits, then against the time of plain PyTorch. What crashes, hangs, is wrong or slow
stays off, and the rest goes on. The result is a table, and a file in your cache directory that new processes read: from
then on the kernels that are on run on this GPU without a request. It holds for this kind of GPU, driver, torch, triton
and version of the kernels. After an interruption, --missing continues.

Operators are those of `inr-kernels info`. Dtypes are float32, tf32 (float32 with TF32 matrix products), bfloat16,
float16 and float64.

On a CPU the C++ kernels run without a proof: --device cpu only shows it. The environment variable
INR_KERNELS_PROVE=auto starts a proof in the background when a program first uses an unproven GPU."""

DEMO = """\
Fill and enlarge a photograph with plain PyTorch and with the fused kernels, and compare.

Two jobs: a photograph with scratches and a hole is filled and enlarged in one pass (DEAR), and one is enlarged alone
(LIIF). Prints time, memory, the largest difference and PSNR (how close an output is to the original; higher is better),
and writes one picture that shows all outputs side by side. The shipped models were not trained on this photograph."""
