// Images of the next message: chosen, dropped or pasted, and shown before they are sent.

const SIDE = 2048; // pixels; larger images are scaled
const TYPES = ["image/png", "image/jpeg", "image/webp", "image/gif"]; // that the server reads

/** A small picture of an image in a data: URL. */
export function thumbnail(url) {
  const made = document.createElement("img");
  made.className = "thumbnail";
  made.alt = "Image";
  made.src = url;
  return made;
}

/** The images of the next message. `place` shows them; `tell` gets what goes wrong. */
export class NextImages {
  constructor(place, tell) {
    this.place = place;
    this.tell = tell;
    this.urls = [];
  }

  /** Take the images, so that the message after the next one has none. */
  take() {
    const urls = this.urls;
    this.set([]);
    return urls;
  }

  set(urls) {
    this.urls = urls;
    this.place.replaceChildren(...urls.map((url, i) => this.#removable(url, i)));
  }

  async add(files) {
    for (const file of files) {
      try {
        const url = await dataURL(file);
        this.set([...this.urls, url]);
      } catch {
        this.tell(new Error(`${file.name} is not an image that this browser can read`));
      }
    }
  }

  #removable(url, index) {
    const button = document.createElement("button");
    button.type = "button";
    button.title = "Remove this image";
    button.setAttribute("aria-label", `Remove image ${index + 1}`);
    button.append(thumbnail(url));
    button.addEventListener("click", () => this.set(this.urls.filter((_, i) => i !== index)));
    return button;
  }
}

/** The files of a drop or of a paste that are images. */
export function imageFiles(transfer) {
  return [...(transfer?.files ?? [])].filter((file) => file.type.startsWith("image/"));
}

/** The bytes of an image file, scaled if a side is too long or the server does not read its type. */
async function dataURL(file) {
  const image = await createImageBitmap(file);
  const scale = Math.min(1, SIDE / Math.max(image.width, image.height));
  if (scale === 1 && TYPES.includes(file.type)) return readFile(file);
  const canvas = document.createElement("canvas");
  canvas.width = Math.max(1, Math.round(scale * image.width));
  canvas.height = Math.max(1, Math.round(scale * image.height));
  canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
  return canvas.toDataURL(file.type === "image/jpeg" ? "image/jpeg" : "image/png", 0.95);
}

function readFile(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.addEventListener("load", () => resolve(reader.result));
    reader.addEventListener("error", () => reject(reader.error));
    reader.readAsDataURL(file);
  });
}
