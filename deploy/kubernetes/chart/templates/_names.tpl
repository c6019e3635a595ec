{{- /* Labels of every object, and of the pods. Users edit nothing in templates/. */ -}}
{{- define "torch-ext.labels" -}}
app.kubernetes.io/name: torch-ext
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}
