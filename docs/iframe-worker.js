// The search runs in a Worker, which browsers refuse to pages opened from the disk. There a hidden frame takes its place.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      this.waiting = []
      const frame = document.body.appendChild(document.createElement("iframe"))
      frame.hidden = true
      this.inner = frame.contentWindow
      const load = (source) => new Promise((done, failed) => {
        const script = this.inner.document.createElement("script")
        Object.assign(script, { src: new URL(source, location.href).href, onload: done, onerror: failed })
        this.inner.document.head.append(script)
      })
      this.inner.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", { data }))
      this.inner.importScripts = async (...sources) => { for (const one of sources) await load(one) }
      load(url).then(() => {
        this.waiting.forEach((data) => this.deliver(data))
        this.waiting = null
      })
    }
    deliver(data) { this.inner.dispatchEvent(new this.inner.MessageEvent("message", { data })) }
    postMessage(data) { this.waiting ? this.waiting.push(data) : this.deliver(data) }
    terminate() { this.inner.frameElement.remove() }
  }
}
